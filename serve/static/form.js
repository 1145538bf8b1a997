// The form of a new run: made from the Config of a script, its comments are the help.
"use strict";
const SCRIPT_NAMES = {
  "train_sft.py": "SFT, from demonstrations (train_sft.py)",
  "train_grpo.py": "GRPO, from trying (train_grpo.py)",
};
const CHECK_PAUSE = 400;  // ms behind the last key
const TRAINING = ["out_dir", "model", "data", "tools"];  // fields that are never folded
const EVALUATION = ["limit", "n", "k", "temperature"];
const LONG_TEXTS = ["system_prompt", "prompt_template"];

async function newView(main, {script = "train_sft.py", config = "", evaluate = ""}) {
  document.title = "New run · nanotool";
  const mine = view;
  const title = script === "evaluate.py" ? `Evaluate ${evaluate}` : "New run";
  main.append(el("div", {class: "head"}, el("h1", {}, title)));
  const status = el("p", {class: "dim", role: "status"}, "Reading the settings …");
  if (script !== "evaluate.py") main.append(await chooser(script, config));
  main.append(status);
  const start = {script, config, evaluate};
  const form = await act("form", {...start, values: {}});
  if (mine !== view) return;
  if (form.error) { status.textContent = form.error; status.className = "why"; return; }
  status.remove();
  main.append(...formOf(start, form));
}
async function chooser(script, config) {
  const scripts = el("select", {}, ...Object.entries(SCRIPT_NAMES).map(([value, words]) =>
    el("option", {value}, words)));
  scripts.value = script;
  const {configs = {}} = await act_read("configs");
  const choices = configs[script] ?? [];
  const files = el("select", {}, el("option", {value: ""}, "the defaults"),
    ...choices.map(({name, help}) => el("option", {value: name, title: help}, name)));
  if (config.startsWith("run:")) {
    files.append(el("option", {value: config}, `the run ${config.slice(4)}`));
  }
  files.value = config;
  const about = choices.find(({name}) => name === config)?.help ?? "";
  scripts.onchange = () => { location.hash = place("new", {script: scripts.value}); };
  files.onchange = () => { location.hash = place("new", {script, config: files.value}); };
  return el("div", {class: "chooser"}, el("label", {}, "What ", scripts),
    el("label", {}, "begin with ", files), el("span", {class: "dim"}, about));
}

// ---- the fields ----
function formOf(start, form) {
  const values = {};  // what differs from the config that was chosen
  const fields = {};  // by key
  const command = el("div");
  const verdict = el("p", {class: "verdict", role: "status", "aria-live": "polite"});
  const result = el("section", {id: "result", "aria-live": "polite"});
  const asked = () => ({...start, values: {...values}});
  let last = 0;  // number of the newest check
  const check = async () => {
    const number = ++last;
    const answer = await act("check", asked());
    if (number === last) showCheck(answer, fields, verdict, command);
  };
  let timer = 0;
  const changed = (name, value) => {
    if (value === fields[name].field.value) delete values[name];
    else values[name] = value;
    clearTimeout(timer);
    timer = setTimeout(check, CHECK_PAUSE);
  };
  for (const field of form.fields) fields[field.name] = fieldOf(field, form.tools, changed);
  for (const [name, value] of Object.entries(form.suggested ?? {})) {
    if (!fields[name]) continue;
    fields[name].set(value);
    if (value !== fields[name].field.value) values[name] = value;
  }
  check();
  const names = form.fields.map(field => field.name);
  const always = start.script === "evaluate.py" ? EVALUATION : TRAINING;
  const differs = name => always.includes(name)
    || fields[name].field.value !== fields[name].field.default;
  const isWide = name => name === "tools" || LONG_TEXTS.includes(name);  // these come last
  const first = names.filter(differs).sort((a, b) => isWide(a) - isWide(b));
  const others = names.filter(name => !differs(name));
  return [
    el("div", {class: "fields", id: "fields"}, ...first.map(name => fields[name].box)),
    folded(others, fields),
    el("div", {class: "actions"}, verdict, command,
      el("div", {class: "buttons"}, ...formButtons(start, asked, fields, verdict, result))),
    result];
}
function folded(names, fields) {
  const search = el("input", {type: "search", placeholder: "find a setting",
    "aria-label": "find a setting"});
  const box = el("div");
  let group = null, list = null;
  for (const name of names) {
    if (fields[name].field.group !== group) {
      group = fields[name].field.group;
      list = el("div", {class: "fields"});
      box.append(el("section", {}, el("h3", {}, group || "settings"), list));
    }
    list.append(fields[name].box);
  }
  search.oninput = () => {
    const words = search.value.toLowerCase();
    for (const name of names) {
      const {box, field} = fields[name];
      box.hidden = !`${name} ${field.help}`.toLowerCase().includes(words);
    }
    for (const section of box.children) {
      section.hidden = ![...section.querySelectorAll(".field")].some(one => !one.hidden);
    }
  };
  return el("details", {class: "more"}, el("summary", {}, `${names.length} more settings`),
    search, box);
}
function fieldOf(field, tools, changed) {
  const id = `field-${field.name}`;
  const tell = value => changed(field.name, value);
  const input = field.name === "tools" ? toolsInput(field, tools, tell) : plainInput(field, tell);
  input.element.id = id;
  const help = el("div", {class: "help", id: `${id}-help`}, field.help,
    el("span", {class: "dim"}, ` (${field.expected}; default: ${field.default || "empty"})`));
  input.element.setAttribute("aria-describedby", `${id}-help`);
  const label = field.name === "tools" ? el("span", {class: "label mono"}, field.name)
    : el("label", {class: "mono", for: id}, field.name);
  const box = el("div", {class: "field", "data-field": field.name}, label, input.element, help);
  return {field, box, set: input.set, element: input.element};
}
function plainInput(field, tell) {
  let element;
  if (field.choices.length) {
    element = el("select", {}, ...field.choices.map(choice => el("option", {}, choice)));
  } else if (LONG_TEXTS.includes(field.name) || field.value.includes("\n")) {
    element = el("textarea", {rows: 3, spellcheck: "false"});
  } else {
    element = el("input", {type: "text", spellcheck: "false", autocomplete: "off"});
  }
  element.value = field.value;
  element.oninput = () => tell(element.value);
  return {element, set: value => { element.value = value; }};
}

// ---- tools: ours to tick, others to name, those of MCP servers to test and add ----
function toolsInput(field, tools, tell) {
  const ours = new Set(tools.map(tool => tool.name));
  const boxes = tools.map(({name, help}) => {
    const tick = el("input", {type: "checkbox", value: name});
    return el("label", {class: "tool", title: help}, tick, ` ${name} `,
      el("span", {class: "dim"}, help.length > 60 ? `${help.slice(0, 58)}…` : help));
  });
  const ticks = boxes.map(box => box.querySelector("input"));
  const others = el("input", {type: "text", spellcheck: "false",
    placeholder: "my_tools.py:weather, mcp:servers.json", "aria-label": "other tools"});
  let order = [];  // as they were named: what a model is shown first
  const summary = el("summary");
  const count = () => {
    const ticked = ticks.filter(tick => tick.checked).map(tick => tick.value);
    summary.textContent = `our tools: ${ticked.join(", ") || "none"} (of ${ticks.length})`;
  };
  const set = value => {
    order = value.split(",").map(name => name.trim()).filter(Boolean);
    for (const tick of ticks) tick.checked = order.includes(tick.value);
    others.value = order.filter(name => !ours.has(name)).join(",");
    count();
  };
  const update = () => {
    const named = others.value.split(",").map(name => name.trim()).filter(Boolean);
    const ticked = ticks.filter(tick => tick.checked).map(tick => tick.value);
    const now = new Set([...ticked, ...named]);
    order = [...order.filter(name => now.has(name)), ...[...now].filter(n => !order.includes(n))];
    count();
    tell(order.join(","));
  };
  for (const tick of ticks) tick.onchange = update;
  others.oninput = update;
  set(field.value);
  const add = name => {
    const named = others.value.split(",").map(one => one.trim()).filter(Boolean);
    if (!named.includes(name)) others.value = [...named, name].join(",");
    update();
  };
  const element = el("div", {class: "tools", role: "group", "aria-label": "tools"},
    el("details", {class: "ours"}, summary, el("div", {class: "ticks"}, ...boxes)),
    el("label", {}, "others, by file or server ", others), serverForm(add));
  return {element, set};
}
function serverForm(add) {
  const name = el("input", {type: "text", placeholder: "time", "aria-label": "server name"});
  const where = el("input", {type: "text", class: "where", spellcheck: "false",
    placeholder: "https://example.org/mcp or uvx mcp-server-time", "aria-label": "URL or command"});
  const token = el("input", {type: "text", placeholder: "none",
    "aria-label": "environment variable that holds its token"});
  const told = el("div", {role: "status", class: "told"});
  const test = async isAdded => {
    told.replaceChildren("asking it …");
    const written = await act("server", {name: name.value, where: where.value,
      token_env: token.value});
    if (written.error) { told.replaceChildren(el("p", {class: "why"}, written.error)); return; }
    const answer = await act("tools", {names: [written.tool], options: []});
    told.replaceChildren(...toolList(answer));
    if (isAdded && !answer.error) add(written.tool);
  };
  return el("details", {class: "server"}, el("summary", {}, "add an MCP server"),
    el("label", {}, "name ", name), el("label", {}, "URL or command ", where),
    el("label", {}, "variable with its token ", token),
    el("span", {class: "buttons"}, button("Test", () => test(false)),
      button("Test and add", () => test(true))), told);
}
function toolList({tools, error}) {
  if (error) return [el("p", {class: "why"}, error)];
  if (!tools.length) return [el("p", {class: "empty"}, "No tools.")];
  return [el("dl", {class: "toollist"}, ...tools.flatMap(tool => [
    el("dt", {class: "mono"}, `${tool.name}(${Object.keys(tool.arguments).join(", ")})`),
    el("dd", {}, tool.help)]))];
}

// ---- what the check says, and what can be asked ----
function showCheck(answer, fields, verdict, command) {
  for (const {element, box} of Object.values(fields)) {
    element.removeAttribute("aria-invalid");
    box.classList.remove("wrong");
  }
  verdict.className = answer.error ? "verdict why" : "verdict good";
  const good = "✓ the checks of the command line pass";
  verdict.textContent = answer.error ? `✕ ${answer.error}` : good;
  const named = answer.error?.match(/^(\w+)/)?.[1];
  if (answer.error && fields[named]) {
    fields[named].element.setAttribute("aria-invalid", "true");
    fields[named].box.classList.add("wrong");
  }
  if (answer.command) command.replaceChildren(copied(answer.command));
}
function formButtons(start, asked, fields, verdict, result) {
  const put = (...parts) => {
    result.replaceChildren(...parts);
    result.scrollIntoView({block: "start"});
  };
  const wait = words => put(el("p", {class: "dim", role: "status"}, words));
  const refused = answer => put(el("p", {class: "why"}, answer.error), ...said(answer));
  const run = button(start.script === "evaluate.py" ? "Evaluate" : "Start", async () => {
    verdict.className = "verdict dim";
    verdict.textContent = "checking, then starting …";
    const answer = await act("start", asked());
    if (answer.error) {
      verdict.className = "verdict why";
      verdict.textContent = `✕ ${answer.error}`;
      return;
    }
    location.hash = toRun(answer.run);
  }, {class: "primary", id: "start"});
  if (start.script === "evaluate.py") return [run];
  const rows = button("Look at the rows", async () => {
    wait("reading the first rows …");
    const answer = await act("rows", asked());
    if (answer.error) return refused(answer);
    put(...rowList(answer));
  });
  const rollout = button("Play one made-up rollout", async () => {
    wait("playing …");
    const answer = await act("made_up", asked());
    if (answer.error) return refused(answer);
    put(...madeUp(answer));
  });
  const tools = button("Test the tools", async () => {
    wait("loading the tools …");
    const valueOf = name => asked().values[name] ?? fields[name]?.field.value ?? "";
    const list = name => valueOf(name).split(",").map(one => one.trim()).filter(Boolean);
    const answer = await act("tools", {names: list("tools"), options: list("tool_options")});
    put(el("h2", {}, "What the model is told of the tools"), ...toolList(answer));
  });
  return [run, rows, tools, rollout];
}
const said = answer => answer.said ? [el("pre", {class: "log"}, answer.said)] : [];
function rowList({rows, notes}) {
  const boxes = rows.map((row, i) => {
    const talk = row.messages.map(({role, text: words}) => el("div", {class: "message"},
      el("span", {class: "role"}, role), el("div", {class: "words"}, words || "(empty)")));
    const columns = Object.entries(row.columns).map(([name, value]) =>
      el("div", {class: "message"}, el("span", {class: "role mono"}, name),
        el("div", {class: "words mono"}, value)));
    const source = row.source ? ` of ${row.source}` : "";
    return el("details", i < 3 ? {open: ""} : {}, el("summary", {}, `row ${i + 1}${source}`),
      ...talk, ...columns);
  });
  return [el("h2", {}, "The first rows, as the run would see them"),
    ...notes.map(note => el("p", {class: "dim"}, note)), ...boxes];
}
function madeUp(answer) {
  const parts = answer.rollouts.flatMap(row => rolloutView(row, answer.images, 0));
  return [el("h2", {}, "A made-up rollout: an oracle plays, tools and rewards are the real ones"),
    ...parts, ...said(answer)];
}
