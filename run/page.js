// Draws what run/page.py reads of a run: settings, curves, rollouts token by token. In report.html
// it stands in the page itself; the page of all runs (serve/page.py) loads it as a file.
// Every text is set as text: what a model writes stays text.
"use strict";
const FOLD = 200;  // tokens: longer context is folded, but for its end
const TAIL = 80;  // tokens of that end, where the question is

const $ = id => document.getElementById(id);
const maker = space => (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);  // strings become text nodes
  return element;
};
const el = maker(document.body.namespaceURI);
const svg = maker(document.querySelector("svg").namespaceURI);
const text = value => typeof value === "string" ? value : JSON.stringify(value);
function number(value, digits = 4) {
  if (typeof value !== "number") return `${value ?? "none"}`;
  const size = Math.abs(value);
  const rounded = Number(value.toPrecision(digits));
  const needsExponent = size && (size < 1e-3 || size >= 1e7);
  const written = needsExponent ? rounded.toExponential() : String(rounded);
  return written.replace("+", "").replaceAll("-", "−");
}
const signed = value => (value > 0 ? "+" : "") + number(value);
function tip(event, words) {
  const box = $("tip");
  box.textContent = words;
  box.style.visibility = words ? "visible" : "hidden";
  if (!words) return;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 6)}px`;
  box.style.top = `${Math.min(event.clientY + 18, innerHeight - box.offsetHeight - 6)}px`;
}

// ---- settings: [name, value, default or null] ----
function settings(rows) {
  if (!rows.length) return [];
  const changed = rows.filter(([name, value, usual]) => value !== usual);
  const chips = changed.map(([name, value, usual]) =>
    el("code", {title: `default: ${usual ?? "none"}`}, `${name} = ${value}`));
  const heads = ["setting", "value", "default"].map(head => el("th", {}, head));
  const table = el("table", {class: "mono"}, el("tr", {}, ...heads));
  for (const [name, value, usual] of rows) {
    const row = el("tr", value === usual ? {class: "dim"} : {});
    row.append(...[name, value, usual ?? ""].map(cell => el("td", {}, cell)));
    table.append(row);
  }
  const summary = el("summary", {}, `all ${rows.length} settings`);
  return [
    el("h2", {}, "Settings that differ from the defaults"),
    el("div", {class: "chips"}, ...chips),
    el("details", {}, summary, el("div", {class: "scroll"}, table))];
}

// ---- curves: data has metrics (a list by key, with nulls), panels and thinned ----
const runningWindow = steps => Math.max(5, Math.floor(steps.length / 40));  // as in curves.png
function mean(values, size) {  // of the last few; gaps are skipped
  return values.map((value, i) => {
    const last = values.slice(Math.max(0, i + 1 - size), i + 1).filter(v => v !== null);
    return value === null ? null : last.reduce((a, b) => a + b, 0) / last.length;
  });
}
function ticks(low, high, most) {  // at multiples of 1, 2 or 5 times a power of ten
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].map(k => k * power).find(size => size >= rough);
  const multiples = [];
  for (let k = Math.ceil(low / unit); k <= high / unit; k++) multiples.push(k * unit);
  return multiples;
}
function range(values, keys) {
  if (keys.every(key => /accuracy$|(call|error)_rate$/.test(key))) return [-0.03, 1.03];
  const low = Math.min(...values);
  const high = Math.max(...values);
  const pad = Math.max((high - low) * 0.06, Math.abs(high) * 1e-3) || 1;  // equal values too
  return [low - pad, high + pad];
}
function chart(data, title, keys, onStep) {
  const steps = data.metrics.step;
  const size = runningWindow(steps);
  const W = 360, H = 190, left = 54, right = 350, top = 8, bottom = 168;
  const all = keys.map(key => data.metrics[key]);
  const means = all.map(values => mean(values, size));
  const values = all.flat().filter(value => value !== null);
  const latest = means.map(series => number(series.findLast(value => value !== null)));
  const head = el("header", {}, el("span", {}, title), ...keys.map((key, k) => el("span",
    {class: `key${k}`}, keys.length > 1 ? `${"—┄"[k] ?? "—"} ${key} ${latest[k]}` : latest[k])));
  const [low, high] = range(values, keys);
  const first = steps[0], last = steps.at(-1);
  const x = step => first === last ? (left + right) / 2
    : left + (step - first) / (last - first) * (right - left);
  const y = value => bottom - (value - low) / (high - low) * (bottom - top);
  const plot = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title});
  for (const value of ticks(low, high, 5)) {
    plot.append(svg("path", {class: "grid", d: `M${left},${y(value)}H${right}`}));
    const at = {x: left - 5, y: y(value) + 3, "text-anchor": "end"};
    plot.append(svg("text", at, number(value, 6)));
  }
  const whole = first === last ? [first] : ticks(first, last, 6).filter(Number.isInteger);
  for (const step of whole) {
    plot.append(svg("text", {x: x(step), y: bottom + 15, "text-anchor": "middle"}, String(step)));
  }
  keys.forEach((key, k) => {
    const dots = [], line = [];
    steps.forEach((step, i) => {
      if (all[k][i] === null) return;
      dots.push(`M${x(step).toFixed(1)},${y(all[k][i]).toFixed(1)}h0`);
      line.push(`${x(step).toFixed(1)},${y(means[k][i]).toFixed(1)}`);
    });
    const wide = Math.max(2, Math.min(5, 800 / steps.length));
    plot.append(svg("path", {class: `dots s${k}`, "stroke-width": wide, d: dots.join("")}));
    plot.append(svg("path", {class: `mean s${k}`, d: `M${line.join("L")}`}));
  });
  const cursor = svg("path", {class: "cursor"});
  plot.append(cursor);
  const nearest = event => {
    const at = (event.clientX - plot.getBoundingClientRect().left) * W / plot.clientWidth;
    return steps.reduce((best, step, i) =>
      Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? i : best, 0);
  };
  plot.onmousemove = event => {
    const i = nearest(event);
    cursor.setAttribute("d", `M${x(steps[i])},${top}V${bottom}`);
    cursor.style.visibility = "visible";
    tip(event, [`step ${steps[i]}`, ...keys.map((key, k) => `${key} ${number(all[k][i])}` +
      (all[k][i] === null ? "" : `   mean of ${size}: ${number(means[k][i])}`))].join("\n"));
  };
  plot.onmouseleave = event => { cursor.style.visibility = "hidden"; tip(event, ""); };
  plot.onclick = event => onStep(steps[nearest(event)]);
  return el("div", {class: "chart"}, head, plot);
}
// chosen: by place, what was chosen where every metric can be; it outlives a redrawing
function curves(data, onStep, hasRollouts, chosen = {}) {
  const steps = data.metrics.step || [];
  // an evaluation, or one answer of an agent, has none
  if (!steps.length && hasRollouts) return [];
  if (!steps.length) return [el("h2", {}, "No metrics yet")];
  const grid = el("div", {class: "charts"}), drawn = new Set(["step"]);
  for (const [title, names] of data.panels) {
    const keys = names.filter(key => key in data.metrics);
    if (keys.length) grid.append(chart(data, title, keys, onStep));
    keys.forEach(key => drawn.add(key));
  }
  const others = Object.keys(data.metrics).filter(key => !drawn.has(key));
  const moving = others.filter(key => new Set(data.metrics[key]).size > 1);
  const initial = (moving.length ? moving : others).slice(0, 3);
  initial.forEach((first, place) => {
    const options = others.map(key => el("option", {}, key));
    const choice = el("select", {"aria-label": "metric"}, ...options);
    let box = grid.appendChild(el("div"));
    choice.value = others.includes(chosen[place]) ? chosen[place] : first;
    const redraw = () => {
      const drawn = chart(data, "", [choice.value], onStep);
      drawn.querySelector("header span").replaceWith(choice);
      box.replaceWith(drawn);
      box = drawn;
    };
    choice.onchange = () => { chosen[place] = choice.value; redraw(); };
    redraw();
  });
  const points = data.thinned > 1 ? `means of ${data.thinned} steps` : "steps";
  const size = runningWindow(steps);
  const about = `Points are ${points}, lines and figures means of the last ${size} points. `;
  const click = hasRollouts ? "A click shows the rollouts of that step." : "";
  return [el("h2", {}, "Curves"), grid, el("p", {class: "dim"}, about + click)];
}

// ---- one rollout: row as run/page.py shows it; images by name; largest: of all advantages ----
function rolloutView(row, images, largest) {
  return [facts(row), legend(row, largest), tokens(row, images, largest), ...strip(row, images),
    el("h2", {}, "Tool calls"), calls(row, images)];
}
function tokens(row, images, largest) {
  const box = el("div", {class: "tokens"});
  const kinds = row.kinds;
  let turn = -1;
  let into = box;  // where the next token goes: the box, or a fold in it
  let unfold = -1;  // the token that goes into the box again
  const starts = row.image_spans.map(([first]) => first);
  for (let i = 0; i < kinds.length; i++) {
    const at = starts.indexOf(i);
    if (at >= 0) {
      into = box;
      const [first, end] = row.image_spans[at];
      box.append(image(row, images, at + 1, end - first));
      i = end - 1;
      continue;
    }
    while (row.turn_starts[turn + 1] === i) {
      turn++;
      const advantage = row.advantages ? `, advantage ${signed(row.advantages[turn])}` : "";
      box.append(el("span", {class: "note"}, `turn ${turn}${advantage}`));
    }
    if (kinds[i] === "c" && kinds[i - 1] !== "c") {
      let end = i;
      while (kinds[end] === "c") end++;
      if (end - i > FOLD) {
        unfold = end - TAIL;
        into = el("details", {}, el("summary", {}, `${unfold - i} tokens of context`));
        box.append(into);
      }
    }
    if (i === unfold) into = box;
    into.append(token(row, i, row.advantages?.[turn], largest));
  }
  box.onmouseover = event => {
    const i = event.target.dataset.i;
    tip(event, i === undefined ? "" : about(row, Number(i)));
  };
  box.onmouseleave = event => tip(event, "");
  return box;
}
function image(row, images, number, tokens) {  // number: from 1
  const name = row.images[number - 1];
  const {width, height, copy, place} = images[name] || {};
  const call = row.calls.find(call => (call.images || []).includes(number));
  const caption = [`image ${number}`];
  if (call) caption.push(`by ${call.name}`);
  caption.push(width ? `${width} × ${height} pixels` : "its file is not there");
  if (tokens) caption.push(`${tokens} tokens`);
  const words = caption.join(", ");
  // place: where a server has it, "" if nowhere; report.html lies beside the folder of images
  const opens = width && place !== "";
  const link = opens ? {href: place ?? name, target: "_blank", title: "opens the whole image"} : {};
  const box = el(opens ? "a" : "span", {class: "image", ...link});
  if (copy) {
    // what is tiny is shown enlarged, pixel by pixel; what is large as its copy
    const longer = Math.max(width, height);
    const scale = Math.min(Math.max(longer, 128), 256) / longer;
    const size = {width: Math.round(scale * width), height: Math.round(scale * height)};
    const picture = el("img", {alt: words, class: scale > 1 ? "coarse" : "", ...size});
    picture.setAttribute("src", copy);
    box.append(picture);
  }
  box.append(words);
  return box;
}
function token(row, i, advantage, largest) {
  // A token without text holds bytes of a character that a later token completes.
  const piece = row.pieces[i].replaceAll("\n", "↵\n") || "·";
  const span = el("span", {class: row.kinds[i], "data-i": i}, piece);
  if (row.kinds[i] === "t" && Number.isFinite(advantage) && advantage) {
    span.classList.add(advantage > 0 ? "plus" : "minus");
    span.style.setProperty("--size", 0.1 + 0.4 * Math.abs(advantage) / largest);
  }
  return span;
}
function about(row, i) {
  const name = {t: "1: trained", c: "0: context", o: "0: tool result", e: "0: tool error",
    u: "0: user", i: "0: image"};
  const lines = [`${JSON.stringify(row.pieces[i])}   id ${row.ids[i]}`];
  lines.push(`token ${i}, mask ${name[row.kinds[i]]}`);
  if (row.kinds[i] === "t" && row.logprobs) {
    const logprob = row.logprobs[i];
    const turn = row.turn_starts.findLastIndex(start => start <= i);
    const advantage = row.advantages ? signed(row.advantages[turn]) : "none";
    lines.push(`logprob ${number(logprob)}   probability ${number(Math.exp(logprob))}`);
    lines.push(`turn ${turn}, advantage ${advantage}`);
  }
  return lines.join("\n");
}
function argumentsOf(call) {
  if (call.arguments === null) return "(could not be read)";
  const pairs = Object.entries(call.arguments);
  return pairs.map(([name, value]) => `${name}: ${text(value)}`).join("\n");
}
function calls(row, images) {
  if (!row.calls.length) return el("p", {class: "dim"}, "No tool calls.");
  const heads = ["turn", "tool", "arguments", "result", "error", "ms"];
  const table = el("table", {}, el("tr", {}, ...heads.map(head => el("th", {}, head))));
  for (const call of row.calls) {
    const red = call.error ? {class: "red"} : {};
    // one that did not fit into the trajectory has a number, but is not there
    const numbers = (call.images || []).filter(number => number <= row.images.length);
    const pictures = numbers.map(number => image(row, images, number));
    table.append(el("tr", {},
      el("td", {}, `${call.turn}`),
      el("td", {class: "mono"}, text(call.name)),
      el("td", {}, el("pre", {}, argumentsOf(call))),
      el("td", {}, el("pre", red, text(call.result)), ...pictures),
      el("td", red, call.error ? text(call.error) : "–"),
      el("td", {}, number(1000 * call.seconds, 3))));
  }
  return el("div", {class: "scroll"}, table);
}
const fact = (name, value) =>
  el("span", {}, el("span", {class: "dim"}, `${name} `), el("b", {}, `${value}`));
function strip(row, images) {  // of a rollout without tokens: of an API, or an old one
  if (!row.images.length || row.image_spans.length) return [];
  const all = row.images.map((name, i) => image(row, images, i + 1));
  return [el("h2", {}, "Images"), el("div", {}, ...all)];
}
function facts(row) {
  const rewards = Object.entries(row.rewards || {});
  const parts = rewards.map(([name, reward]) => `${name} ${number(reward)}`);
  const different = new Set(row.advantages || ["none"]);  // often one for all turns
  const trained = [...row.kinds].filter(kind => kind === "t").length;
  const failed = row.calls.filter(call => call.error).length;
  return el("div", {class: "facts"},
    fact("step", `${number(row.step)}, group ${row.group}, sample ${row.sample}` +
      (row.source ? `, of ${row.source}` : "")),
    fact("reward", number(row.reward)),
    fact("from", parts.join(", ") || "nothing"),
    fact("advantage", [...different].map(signed).join(", ")),
    fact("stop", row.stop),
    ...Object.entries(row.metrics || {}).map(([name, value]) => fact(name, number(value))),
    ...row.failure ? [el("span", {class: "red"}, text(row.failure))] : [],
    fact("answer", text(row.answer ?? "none")),
    fact("turns", row.turn_starts.length),
    fact("seconds", number(row.seconds)),
    fact("tokens", `${row.kinds.length}, ${trained} trained`),
    ...row.images.length ? [fact("images", row.images.length)] : [],
    fact("calls", row.calls.length),
    el("span", {class: "red"}, failed ? `${failed} failed` : ""));
}
function legend(row, largest) {
  const kinds = {
    "t": "trained (mask 1)",
    "c": "context (mask 0)",
    "o": "tool result (mask 0)",
    "e": "tool error (mask 0)",
    ...row.kinds.includes("u") ? {"u": "user (mask 0)"} : {},
    ...largest ? {"t plus": "advantage above 0", "t minus": "advantage below 0"} : {},
  };
  const spans = Object.entries(kinds).map(([kind, words]) => el("span", {class: kind}, words));
  const strongest = largest ? `strongest at ±${number(largest)}; ` : "";
  return el("div", {class: "legend"}, ...spans,
    el("span", {class: "dim"}, `${strongest}hover over a token for more`));
}

// ---- the pager through them ----
const isFailed = row => row.failed ?? row.calls.some(call => call.error);
function strongest(rows) {  // of all their advantages
  const all = rows.flatMap(row => row.strongest ?? row.advantages ?? []);
  return all.filter(Number.isFinite).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
}
class Pager {
  // load(row): what rolloutView draws of it, {row, images}, or a promise of it
  constructor(box, load) {
    this.load = load;
    this.rows = [];  // all; shown: those that pass the filter
    this.shown = [];
    this.at = 0;
    this.drawn = null;  // the facts of the one that stands there
    this.box = box;
    this.build();
  }
  build() {
    const button = (words, key, by) => {
      const made = el("button", {type: "button", title: `${key} arrow key`}, words);
      made.onclick = () => this.go(this.at + by);
      return made;
    };
    this.back = button("◀ previous", "left", -1);
    this.next = button("next ▶", "right", 1);
    this.slider = el("input", {type: "range", min: 0, step: 1, "aria-label": "rollout"});
    this.where = el("span");
    this.low = el("input", {type: "number", step: "any"});
    this.high = el("input", {type: "number", step: "any"});
    this.stop = el("select");
    this.errors = el("input", {type: "checkbox"});
    this.sampling = el("div", {class: "dim"});
    this.view = el("div", {class: "rollout"});
    this.slider.oninput = () => this.go(Number(this.slider.value));
    for (const field of [this.low, this.high, this.stop, this.errors]) {
      field.oninput = () => this.filter();
    }
    this.box.replaceChildren(el("h2", {}, "Rollouts"), this.sampling, el("div", {class: "bar"},
      el("span", {}, this.back, " ", this.next), this.slider, this.where,
      el("label", {}, "reward from ", this.low), el("label", {}, "to ", this.high),
      el("label", {}, "stop ", this.stop), el("label", {}, this.errors, " has tool error")),
    this.view);
  }
  set(rows, written) {  // the one that is looked at stays
    this.sampling.textContent = written > rows.length
      ? `${rows.length} of the ${written} rollouts, evenly spread over the run` : "";
    const chosen = this.stop.value || "any";
    const stops = [...new Set(rows.map(row => text(row.stop)))].sort();
    this.stop.replaceChildren(...["any", ...stops].map(stop => el("option", {}, stop)));
    this.stop.value = stops.includes(chosen) ? chosen : "any";
    this.rows = rows;
    this.largest = strongest(rows);
    this.filter();
  }
  filter() {
    const low = this.low.value, high = this.high.value, stop = this.stop.value;
    const before = this.shown[this.at];
    this.shown = this.rows.filter(row => {
      const isNumber = typeof row.reward === "number";
      if (low !== "" && !(isNumber && row.reward >= Number(low))) return false;
      if (high !== "" && !(isNumber && row.reward <= Number(high))) return false;
      if (stop !== "any" && text(row.stop) !== stop) return false;
      return !this.errors.checked || isFailed(row);
    });
    const same = row => row === before || (before && row.number !== undefined
      && row.number === before.number);
    this.go(Math.max(0, this.shown.findIndex(same)));
  }
  go(to) {
    this.at = Math.max(0, Math.min(this.shown.length - 1, to));
    tip(null, "");
    this.draw();
  }
  seek(step) {  // the first rollout at or after this step
    if (!this.shown.length) return;
    const first = this.shown.findIndex(row => row.step >= step);
    this.go(first < 0 ? this.shown.length - 1 : first);
    this.box.scrollIntoView({behavior: "smooth"});
  }
  async draw() {
    const row = this.shown[this.at];
    this.slider.max = Math.max(0, this.shown.length - 1);
    this.slider.value = this.at;
    this.back.disabled = !row || this.at === 0;
    this.next.disabled = !row || this.at === this.shown.length - 1;
    const step = row && typeof row.step === "number" ? `step ${row.step}, ` : "";
    this.where.textContent = `${step}${row ? this.at + 1 : 0} of ${this.shown.length}`;
    if (!row) {
      this.drawn = null;
      this.view.replaceChildren("No rollout passes the filter.");
      return;
    }
    // what stands there already is left as it is: somebody reads it while the run goes on
    const known = row.number === undefined ? null : JSON.stringify(row);
    if (known && known === this.drawn) return;
    const loaded = await this.load(row);
    if (row !== this.shown[this.at] || !loaded) return;  // another one is looked at by now
    this.drawn = known;
    this.view.replaceChildren(...rolloutView(loaded.row, loaded.images, this.largest));
  }
  key(event) {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;  // arrows mean more there
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") this.go(this.at - 1);
    if (event.key === "ArrowRight") this.go(this.at + 1);
  }
}
