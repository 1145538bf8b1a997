// The page of all runs: the list, one run, a comparison. form.js has the form of a new one.
"use strict";
const PAUSE = 2000;  // ms between two looks at what changes
const HIDDEN_PAUSE = 15000;  // where nobody sees it

// ---- asking the server ----
class Unreachable extends Error {}
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Unreachable("the server of this page does not answer; trying again");
  }
  if (response.status === 401) throw new Unreachable((await response.json()).error);
  try {
    return await response.json();  // of what is refused, {error: the sentence}
  } catch {
    throw new Unreachable(`the server of this page failed (${response.status})`);
  }
}
const read = (name, values = {}) => ask(`/api/${name}?${new URLSearchParams(values)}`);
async function act(name, value) {  // what it refuses, and what fails, is {error}
  const headers = {"Content-Type": "application/json"};
  try {
    return await ask(`/api/${name}`, {method: "POST", headers, body: JSON.stringify(value)});
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    return {error: error.message};
  }
}
function say(words) {
  if ($("connection").textContent !== words) $("connection").textContent = words;
}

// ---- what is looked at again and again, until another view is chosen ----
let view = 0;  // number of the view that is shown
function live(look) {
  const mine = view;
  const again = async () => {
    if (mine !== view) return;
    const started = performance.now();
    try {
      await look();
      if (mine === view) say("");
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      if (mine === view) say(error.message);
    }
    const took = performance.now() - started;
    setTimeout(again, Math.max(document.hidden ? HIDDEN_PAUSE : PAUSE, 4 * took));
  };
  again();
}
// Draws again without taking the focus away from who uses the keyboard.
function redraw(box, ...children) {
  const key = box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  box.replaceChildren(...children);
  if (key) [...box.querySelectorAll("[data-key]")].find(one => one.dataset.key === key)?.focus();
}

// ---- small parts ----
const SIGNS = {running: "●", stopping: "◐", ended: "✓", stopped: "‖", crashed: "✕"};
const badge = status => el("span", {class: `badge ${status}`}, `${SIGNS[status] ?? "?"} ${status}`);
const place = (page, values) => `#/${page}?${new URLSearchParams(values)}`;
const toRun = name => place("run", {name});
function button(words, action, more = {}) {
  const made = el("button", {type: "button", ...more}, words);
  made.onclick = async () => {
    made.disabled = true;
    await action();
    made.disabled = false;
  };
  return made;
}
function ago(seconds) {
  const past = Date.now() / 1000 - seconds;
  if (!seconds) return "";
  if (past < 90) return `${Math.max(0, Math.round(past))} s ago`;
  if (past < 5400) return `${Math.round(past / 60)} min ago`;
  if (past < 129600) return `${Math.round(past / 3600)} h ago`;
  return `${Math.round(past / 86400)} days ago`;
}
const gib = bytes => `${number(bytes / 2 ** 30, 3)} GiB`;
function progressOf(state) {
  if (!state.step) return "";
  return state.steps ? `${state.step} of ${state.steps} steps` : `${state.step} steps`;
}
function numbersOf(state) {
  const names = Object.keys(state.numbers);
  return names.map(name => `${name} ${number(state.numbers[name], 3)}`).join("  ");
}
function copied(words) {  // a command, and a button that copies it
  const box = el("div", {class: "command"}, el("code", {}, words));
  const copy = button("copy", async () => {
    try {
      await navigator.clipboard.writeText(words);
      copy.textContent = "copied";
    } catch {  // not allowed: it is selected, to be copied by hand
      getSelection().selectAllChildren(box.querySelector("code"));
    }
  });
  box.append(copy);
  return box;
}
function bar(share, words) {
  const meter = el("meter", {min: 0, max: 1, low: .7, high: .9, optimum: 0, value: share});
  return el("span", {class: "gauge"}, `${words} `, meter);
}

// ---- this machine ----
async function showMachine() {
  const {cpu, cores, memory, memory_used, gpus, disk_free, error} = await read("machine");
  if (error) return;
  const parts = [
    bar(cpu / 100, `CPU ${Math.round(cpu)} % of ${cores} cores`),
    bar(memory_used / memory, `memory ${number(memory_used / 2 ** 30, 3)} of ${gib(memory)}`)];
  gpus.forEach((gpu, i) => parts.push(bar(gpu.used / gpu.total,
    `GPU ${i} ${gpu.busy} %, ${number(gpu.used / 1024, 3)} of ${number(gpu.total / 1024, 3)} GiB`)));
  if (disk_free !== undefined) parts.push(el("span", {}, `disk ${gib(disk_free)} free`));
  $("machine").replaceChildren(...parts);
}
async function watchMachine() {
  if (!document.hidden) {
    try { await showMachine(); } catch (error) { if (!(error instanceof Unreachable)) throw error; }
  }
  setTimeout(watchMachine, 2 * PAUSE);
}

// ---- all runs ----
const chosen = new Set();  // names of the runs to compare
function runsView(main) {
  const words = el("input", {type: "search", placeholder: "filter by name, kind, status",
    "aria-label": "filter"});
  const compare = el("a", {class: "button", href: "#/"}, "Compare");
  const box = el("div");
  let known = null;
  const draw = () => { if (known) redraw(box, ...runsTable(known, words.value, compare)); };
  words.oninput = draw;
  main.append(el("div", {class: "head"}, el("h1", {}, "Runs"), words, compare,
    el("a", {class: "button primary", href: "#/new"}, "New run")), box);
  let before = "";
  live(async () => {
    const answer = await read("runs");
    const now = JSON.stringify(answer) + Math.floor(Date.now() / 30000);  // "2 min ago"
    if (now === before) return;
    before = now;
    known = answer;
    draw();
  });
}
function runsTable({root, runs}, words, compare) {
  const there = new Set(runs.map(run => run.name));
  for (const name of chosen) if (!there.has(name)) chosen.delete(name);
  const count = () => {
    compare.textContent = chosen.size < 2 ? "Compare (tick two)" : `Compare ${chosen.size}`;
    compare.setAttribute("aria-disabled", chosen.size < 2);
    const names = new URLSearchParams([...chosen].map(name => ["run", name]));
    compare.href = chosen.size < 2 ? "#/" : `#/compare?${names}`;
  };
  count();
  if (!runs.length) {
    return [el("div", {class: "empty"}, el("p", {}, `No runs below ${root} yet.`),
      el("p", {}, "A first one, a minute on two cores: ",
        el("a", {href: place("new", {script: "train_sft.py", config: "calc_sft.py"})},
          "SFT of a tiny model, calc_sft.py"), "."))];
  }
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = runs.filter(run => {
    const about = `${run.name} ${run.kind} ${run.status} ${run.model} ${run.data}`.toLowerCase();
    return wanted.every(word => about.includes(word));
  });
  if (!shown.length) return [el("p", {class: "empty"}, "No run passes the filter.")];
  const heads = ["", "run", "status", "progress", "last numbers", "model, data", "written"];
  const table = el("table", {class: "runs"}, el("thead", {}, el("tr", {},
    ...heads.map(head => el("th", {scope: "col"}, head)))));
  const body = table.appendChild(el("tbody"));
  for (const run of shown) {
    const tick = el("input", {type: "checkbox", "aria-label": `compare ${run.name}`,
      "data-key": `tick ${run.name}`});
    tick.checked = chosen.has(run.name);
    tick.onchange = () => { chosen[tick.checked ? "add" : "delete"](run.name); count(); };
    const link = el("a", {href: toRun(run.name), "data-key": `run ${run.name}`}, run.name);
    const why = run.status === "crashed" ? el("div", {class: "why"}, run.why) : "";
    const source = [run.model, run.data].filter(Boolean).map(text).join(", ");
    body.append(el("tr", {},
      el("td", {class: "tick"}, tick),
      el("td", {class: "name"}, link, el("span", {class: "kind"}, run.kind)),
      el("td", {class: "status"}, badge(run.status), why),
      el("td", {class: "steps"}, progressOf(run), run.steps && run.step
        ? el("progress", {max: run.steps, value: run.step, "aria-label": "steps"}) : ""),
      el("td", {class: "numbers"}, numbersOf(run)),
      el("td", {class: "source"}, el("div", {title: source}, source)),
      el("td", {class: "when"}, ago(run.changed))));
  }
  return [table];
}

// ---- one run ----
function runView(main, {name}) {
  document.title = `${name} · nanotool`;
  const head = el("div", {class: "runhead"});
  const told = el("div", {role: "status", class: "told", "aria-live": "polite"});
  const drawn = {};  // the sections that are drawn when something has changed
  const sections = {};
  for (const id of ["evaluation", "curves", "rollouts", "log", "settings"]) {
    sections[id] = el("section", {id});
  }
  main.append(head, told, ...Object.values(sections));
  const pager = new Pager(sections.rollouts, async row => {
    const answer = await act_read("rollout", {run: name, number: row.number});
    if (answer.error) { told.textContent = answer.error; return null; }
    return answer;
  });
  sections.rollouts.hidden = true;
  keys = event => pager.key(event);
  const log = logBox(sections.log, name);
  const choices = {};
  let seen = "", rollouts_seen = "", shownHead = "";
  live(async () => {
    const answer = await read("run", {run: name, seen, rollouts_seen});
    if (answer.error) {
      head.replaceChildren(el("h1", {}, name), el("p", {}, answer.error));
      return;
    }
    seen = answer.stamp;
    rollouts_seen = answer.rollouts_stamp;
    const now = JSON.stringify([answer.state, answer.evaluations]);
    if (now !== shownHead) {
      shownHead = now;
      redraw(head, ...runHead(answer.state, answer.evaluations, told));
    }
    if (answer.settings) sections.settings.replaceChildren(...settings(answer.settings));
    if (answer.evaluation) {
      sections.evaluation.replaceChildren(...evaluationTable(answer.evaluation));
    }
    if (answer.rollouts) {
      sections.rollouts.hidden = !answer.rollouts.length;
      pager.set(answer.rollouts, answer.written);
    }
    if (answer.curves) {
      drawn.curves = answer.curves;
      sections.curves.replaceChildren(...runCurves(answer, pager, choices));
    }
    await log();
  });
}
const act_read = async (name, values) => {
  try {
    return await read(name, values);
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    return {error: error.message};
  }
};
function runCurves({curves: data, state}, pager, choices) {
  if (data.steps) return curves(data, step => pager.seek(step), true, choices);
  if (state.kind === "evaluation") return [];
  const words = state.pid ? "No step is done yet: it loads the model and the data."
    : "No step was done.";
  return [el("h2", {}, "Curves"), el("p", {class: "empty"}, words)];
}
function runHead(state, evaluations, told) {
  const parts = [state.kind, progressOf(state), state.model, state.data].filter(Boolean);
  const kind = state.status === "crashed" ? "why" : "dim";
  const why = state.why ? el("p", {class: kind}, state.why) : "";
  const head = [
    el("div", {class: "head"}, el("h1", {}, state.name), badge(state.status),
      ...runButtons(state, told)),
    el("p", {class: "about"}, parts.map(text).join(" · "),
      state.pid ? ` · process ${state.pid}` : ""),
    why];
  if (state.steps && state.step) {
    head.push(el("progress", {class: "wide", max: state.steps, value: state.step,
      "aria-label": "steps"}));
  }
  if (state.command) {
    const words = state.command.map((word, i) => i ? word : "python").map(quoted).join(" ");
    head.push(copied(words));
  }
  if (evaluations.length) {
    const rows = evaluations.map(run => el("li", {}, el("a", {href: toRun(run.name),
      "data-key": run.name}, run.name), " ", badge(run.status), ` ${numbersOf(run)}`));
    head.push(el("h2", {}, "Evaluations"), el("ul", {class: "evaluations"}, ...rows));
  }
  return head;
}
// as a shell reads it
const quoted = word => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
function runButtons(state, told) {
  const tell = answer => { told.textContent = answer.error ?? answer.told ?? ""; };
  const script = {GRPO: "train_grpo.py", SFT: "train_sft.py"}[state.kind];
  const buttons = [];
  if (state.status === "running") {
    buttons.push(button("Stop", async () => tell(await act("stop", {run: state.name})),
      {"data-key": "stop", title: "as Ctrl-C: it finishes its step and saves"}));
  }
  if (state.status === "stopping") {
    buttons.push(button("End at once", async () => {
      if (!confirm("End it at once? The step that it works on is lost.")) return;
      tell(await act("stop", {run: state.name, now: true}));
    }, {"data-key": "stop"}));
  }
  if (script && !state.pid) {
    buttons.push(resumeForm(state, script, tell));
  }
  const isOpen = ["stopped", "crashed"].includes(state.status);
  if (state.kind === "evaluation" && state.command && isOpen) {
    const asked = {script: "evaluate.py", resume: state.name, values: {}};
    buttons.push(button("Resume", async () => tell(await act("start", asked)),
      {"data-key": "resume"}));
  }
  if (script) {
    buttons.push(
      el("a", {class: "button", "data-key": "like", href: place("new", {script,
        config: `run:${state.name}`})}, "New like this"));
  }
  if (state.kind === "GRPO") {
    buttons.push(el("a", {class: "button", "data-key": "evaluate",
      href: place("new", {script: "evaluate.py", evaluate: state.name})}, "Evaluate"));
  }
  return buttons;
}
function resumeForm(state, script, tell) {  // a training that is to be longer says so here
  const key = script === "train_grpo.py" ? "steps" : "epochs";
  const field = el("input", {type: "text", inputmode: "decimal", size: 5, "data-key": "longer",
    placeholder: state.steps ?? "", "aria-label": `${key}, if it is to be longer`});
  const go = button("Resume", async () => {
    const values = field.value.trim() ? {[key]: field.value.trim()} : {};
    tell(await act("start", {script, resume: state.name, values}));
  }, {"data-key": "resume"});
  field.onkeydown = event => { if (event.key === "Enter") go.click(); };
  return el("span", {class: "group"}, go, el("label", {}, `${key} `, field));
}
function evaluationTable(numbers) {
  const rows = Object.entries(numbers).filter(([, value]) => typeof value !== "object");
  if (!rows.length) return [];
  const table = el("table", {class: "plain"});
  for (const [name, value] of rows) {
    table.append(el("tr", {}, el("th", {scope: "row"}, name),
      el("td", {}, typeof value === "number" ? number(value) : text(value))));
  }
  return [el("h2", {}, "Numbers of the evaluation"), el("div", {class: "scroll"}, table)];
}
function logBox(section, name) {  // returns what shows the log again
  const box = el("pre", {class: "log", tabindex: 0, "aria-label": "log"});
  const details = el("details", {open: ""}, el("summary", {}, "What it prints"), box);
  return async () => {
    if (!details.open) return;
    const {text: words, is_there} = await read("log", {run: name});
    if (!is_there || words === undefined) { section.replaceChildren(); return; }
    if (!details.isConnected) section.replaceChildren(details);
    if (box.textContent === words) return;
    const wasAtEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 20;
    box.textContent = words;
    if (wasAtEnd) box.scrollTop = box.scrollHeight;
  };
}

// ---- a comparison: the page of report.py, which can reach nothing of this one ----
function compareView(main, values, names) {
  const query = new URLSearchParams(names.map(name => ["run", name]));
  const frame = el("iframe", {class: "report", title: "comparison", sandbox: "allow-scripts"});
  frame.setAttribute("src", `/compare?${query}`);
  main.append(el("div", {class: "head"}, el("h1", {}, `${names.length} runs compared`),
    ...names.map(name => el("a", {href: toRun(name)}, name))), frame);
}

// ---- which view ----
let keys = null;  // what is told of keys
const VIEWS = {"": runsView, run: runView, new: newView, compare: compareView};
function show() {
  view++;
  keys = null;
  const [, page, query] = location.hash.match(/^#\/([a-z]*)\??(.*)$/) ?? ["", "", ""];
  const values = new URLSearchParams(query);
  document.title = "nanotool";
  for (const link of document.querySelectorAll("nav [data-view]")) {
    const isHere = link.dataset.view === (page === "new" ? "new" : "runs");
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const main = $("main");
  main.replaceChildren();
  tip(null, "");
  (VIEWS[page] ?? runsView)(main, Object.fromEntries(values), values.getAll("run"));
}
document.addEventListener("DOMContentLoaded", () => {
  // the token is in a cookie by now: it need not stand in the history
  history.replaceState(null, "", location.pathname + location.hash);
  onhashchange = () => { show(); $("main").focus(); scrollTo(0, 0); };
  document.onkeydown = event => keys?.(event);
  show();
  watchMachine();
});
