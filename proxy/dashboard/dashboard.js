// The dashboard's only script: plain DOM, plotly for the charts. Text from the API goes in as textContent, never as HTML:
// models are named by anybody. The address's hash holds the view and its range.
"use strict";

const $ = id => document.getElementById(id);
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone || "local time";
const OUTCOMES = ["rejected", "upstream_error", "upstream_timeout", "connect_error", "truncated", "client_gone", "gateway_crash",
  "invalid_request"];
const ORIGINS = [["client", "clients"], ["injected", "injected"], ["replay", "replays"], ["shadow", "shadow"],
  ["imported", "imported"]];
const RANKS = {viewer: 0, operator: 1, admin: 2};
const state = {role: "viewer", readOnly: false, live: null, points: [], kept: 900, wasBurst: false, span: 300};

// Elements ----------------------------------------------------------------------------------------------------------------

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Figures -----------------------------------------------------------------------------------------------------------------

const missing = value => value === null || value === undefined || Number.isNaN(value);

function number(value) {
  if (missing(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e7) return Intl.NumberFormat(undefined, {notation: "compact", maximumFractionDigits: 1}).format(value);
  const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : 2;
  return value.toLocaleString(undefined, {maximumFractionDigits: digits});
}
function seconds(value) {
  if (missing(value)) return "–";
  if (value >= 120) return `${number(value / 60)} min`;
  return value >= 1 ? `${number(value)} s` : `${number(value * 1e3)} ms`;
}
function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) { value /= 1024; place += 1; }
  return `${number(place ? Math.round(value * 10) / 10 : value)} ${units[place]}`;
}
const percent = share => missing(share) ? "–" : `${number(share * 100)} %`;
function when(epoch_s, precise = false) {
  if (missing(epoch_s)) return "–";
  return new Date(epoch_s * 1e3).toLocaleString(undefined, {
    year: "numeric", month: "short", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false,
    ...(precise ? {fractionalSecondDigits: 3} : {}),
  });
}
const total = values => Object.values(values || {}).reduce((sum, value) => sum + value, 0);

// The API -----------------------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function api(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      ...options,
      headers: {"x-burstgate-request": "1", ...(options.body ? {"content-type": "application/json"} : {})},
      signal: AbortSignal.timeout(60_000),
    });
  } catch (error) {
    throw new Refusal(0, error.name === "TimeoutError" ? "The control plane did not answer within a minute."
      : "The control plane can not be reached. Is burstgate running?");
  }
  if (answer.ok) return answer.json();
  let message = `${answer.status} ${answer.statusText}`;
  try { message = (await answer.json()).error.message; } catch { /* no envelope: the status says it */ }
  if (answer.status === 401) banner("Your session has ended.", "Log in", "/login");
  throw new Refusal(answer.status, message);
}

function explain(error) {
  const advice = {
    404: "This gateway does not have this part of the API: it may be an older version.",
    413: "Choose a shorter range.",
    503: "It comes back by itself when the database does; recording goes on meanwhile. Try again then.",
  }[error.status];
  return advice ? `${error.message}. ${advice}` : error.message;
}

function banner(text, label, href) {
  $("banner").replaceChildren(text, ...(label ? [" ", el("a", {href}, label)] : []));
  $("banner").hidden = !text;
}
let toastEnds;
function toast(text) {
  set($("toast"), text);
  clearTimeout(toastEnds);
  toastEnds = setTimeout(() => set($("toast"), ""), 6000);
}
function note(id, text, isError = false) {
  $(id).replaceChildren(...(text ? [el("p", {class: isError ? "note error" : "empty"}, text)] : []));
}
const may = role => !state.readOnly && RANKS[state.role] >= RANKS[role];

// A table whose rows are kept while their key is, so that a button in it keeps the focus.
class Table {
  // columns: {head, text(row), num?, long?, tone?(row), button?(row) -> {label, does, title} or null}
  constructor(place, label, columns, empty) {
    this.columns = columns;
    this.body = el("tbody");
    this.rows = new Map();
    const heads = columns.map(column => el("th", {scope: "col", class: column.num ? "num" : ""}, column.head));
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads)), this.body);
    this.wrap = el("div", {class: "wrap", tabIndex: 0, role: "region", "aria-label": label}, table);
    this.empty = el("p", {class: "empty"}, empty);
    place.replaceChildren(this.wrap, this.empty);
    this.show([]);
  }

  show(rows, key = row => row.name) {
    const seen = new Set();
    rows.forEach((row, place) => {
      const name = key(row);
      seen.add(name);
      let kept = this.rows.get(name);
      if (!kept) this.rows.set(name, kept = this.made());
      kept.row = row;
      this.columns.forEach((column, index) => this.fill(kept, column, kept.cells[index]));
      if (this.body.children[place] !== kept.line) this.body.insertBefore(kept.line, this.body.children[place] || null);
    });
    for (const [name, kept] of this.rows) if (!seen.has(name)) { kept.line.remove(); this.rows.delete(name); }
    this.wrap.hidden = !rows.length;
    this.empty.hidden = rows.length > 0;
  }

  made() {
    const cells = this.columns.map(column => el("td", {class: column.num ? "num" : column.long ? "long" : column.name ? "name" : ""}));
    return {cells, line: el("tr", {}, ...cells), row: null};
  }

  fill(kept, column, cell) {
    if (column.button) {
      const wanted = column.button(kept.row);
      let button = cell.firstElementChild;
      if (!wanted) { if (button) button.remove(); return; }
      if (!button) {
        button = el("button", {type: "button", class: column.link ? "link" : "", onclick: () => column.button(kept.row)?.does()});
        cell.append(button);
      }
      set(button, wanted.label);
      if (wanted.title) button.setAttribute("aria-label", wanted.title);
      return;
    }
    set(cell, column.text(kept.row));
    if (column.name) cell.title = cell.textContent;
    if (column.tone) cell.className = `${column.num ? "num" : ""} ${column.tone(kept.row)}`;
  }
}

class Tiles {
  constructor(place, names) {
    this.parts = names.map(name => {
      const figure = el("div", {class: "figure"}), more = el("div", {class: "more"});
      const tile = el("div", {class: "tile"}, el("div", {class: "name"}, name), figure, more);
      place.append(tile);
      return {tile, figure, more};
    });
  }

  // values: [text, unit, more, level] each
  show(values) {
    values.forEach(([text, unit, more, level], index) => {
      const {tile, figure, more: below} = this.parts[index];
      if (figure.dataset.text !== `${text} ${unit}`) {
        figure.replaceChildren(text, ...(unit ? [" ", el("small", {}, unit)] : []));
        figure.dataset.text = `${text} ${unit}`;
      }
      set(below, more || "");
      tile.dataset.level = level || "";
    });
  }
}

// Charts ------------------------------------------------------------------------------------------------------------------

const probe = el("span", {hidden: true});
document.body.append(probe);
function colour(name) {  // plotly knows no light-dark()
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
const isCoarse = matchMedia("(pointer: coarse)").matches;
const charts = new Set();

class Chart {
  // empty: what to say without data. onRange: takes what was chosen by dragging.
  constructor(place, title, unit, {empty = "No requests in this time.", wide = false, onRange = null} = {}) {
    this.unit = unit;
    this.title = title;
    this.onRange = onRange;
    this.plot = el("div", {class: "plot", role: "img", "aria-label": title});
    this.none = el("div", {class: "none"}, empty);
    this.keys = el("div", {class: "keys", "aria-hidden": "true"});
    this.value = el("span", {class: "unit"}, unit);
    this.plot.append(this.none);
    this.figure = el("figure", {class: `chart${wide ? " wide" : ""}`},
      el("figcaption", {}, el("h3", {}, title), this.value), this.keys, this.plot);
    place.append(this.figure);
    this.isNear = false;
    this.isStale = false;
    charts.add(this);
    Chart.near.observe(this.figure);
  }

  // traces: [{name, y, colour?, fill?}]; shapes: [{from, to}] marked stretches; x: Dates
  show(x, traces, {marks = [], now = null, bars = false, range = null, names = false} = {}) {
    this.last = [x, traces, {marks, now, bars, range, names}];
    this.isStale = true;
    this.draw();
  }

  draw() {
    if (!this.isStale || !this.isNear || document.hidden || !this.last || typeof Plotly === "undefined") return;
    this.isStale = false;
    const [x, traces, {marks, now, bars, range, names}] = this.last;
    const drawn = traces.filter(trace => trace.y.some(value => !missing(value)));
    const isEmpty = !drawn.some(trace => trace.y.some(value => value));
    this.none.hidden = !isEmpty;
    set(this.value, now ? `${now} ${this.unit}` : this.unit);
    this.plot.setAttribute("aria-label", isEmpty ? `${this.title}: ${this.none.textContent}`
      : `${this.title}${now ? `: now ${now}` : ""}, ${this.unit}`);
    const colours = traces.map((trace, index) => colour(trace.colour || `series-${index % 8 + 1}`));
    const legend = traces.map(trace => trace.name).join("\n") + colours.join();
    if (this.legend !== legend) {
      this.legend = legend;
      this.keys.replaceChildren(...(traces.length > 1 || names ? traces : []).map((trace, index) => {
        const line = el("i");
        line.style.borderColor = colours[index];
        line.style.borderTopStyle = {dash: "dashed", dot: "dotted"}[trace.dash] || "solid";
        return el("span", {}, line, trace.name);
      }));
    }
    const line = colour("line"), text = colour("faint");
    const axis = {gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: {color: text, size: 10}, automargin: true};
    const data = traces.map((trace, index) => bars ? {
      type: "bar", name: trace.name, x, y: trace.y, marker: {color: colours[index], line: {width: 0}},
    } : {
      type: "scatter", mode: trace.y.filter(value => !missing(value)).length > 3 ? "lines" : "lines+markers", name: trace.name, x, y: trace.y, connectgaps: false,
      line: {color: colours[index], width: 1.6, dash: trace.dash || "solid", shape: trace.step ? "hv" : "linear"},
      ...(trace.fill ? {fill: "tozeroy", fillcolor: colours[index].replace("rgb(", "rgba(").replace(")", ", .12)")} : {}),
    });
    const warn = colour("warn");
    Plotly.react(this.plot, data, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 8, r: 8, t: 14, b: 8},
      font: {color: text, size: 11, family: "system-ui, sans-serif"}, showlegend: false, hovermode: "x unified", barmode: "stack",
      bargap: 0.08, hoverlabel: {bgcolor: colour("card"), bordercolor: line, font: {color: colour("text"), size: 11}},
      dragmode: this.onRange ? "zoom" : false,
      xaxis: {...axis, type: "date", showgrid: false, fixedrange: !this.onRange || isCoarse, nticks: 6,
        ...(range ? {range, autorange: false} : {autorange: true}), hoverformat: "%b %d %H:%M:%S"},
      yaxis: {...axis, rangemode: "tozero", fixedrange: true, nticks: 5, autorange: !isEmpty, ...(isEmpty ? {range: [0, 1]} : {}),
        showticklabels: !isEmpty, zeroline: true},
      shapes: marks.map(({from, to}) => ({type: "rect", xref: "x", yref: "paper", x0: from, x1: to, y0: 0, y1: 1, layer: "below",
        fillcolor: warn, opacity: 0.16, line: {width: 0}})),
      annotations: marks.map(({from}) => ({x: from, y: 1, xref: "x", yref: "paper", yanchor: "bottom", xanchor: "left", showarrow: false,
        text: "▲ burst", font: {size: 10, color: warn}, borderpad: 0})),
    }, {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: false}).then(plot => {
      if (this.onRange && !this.isWatched) {
        this.isWatched = true;
        plot.on("plotly_relayout", change => {
          const [from, to] = [change["xaxis.range[0]"], change["xaxis.range[1]"]].map(each => each && new Date(each.replace(" ", "T")) / 1e3);
          if (from && to && to - from >= 1) this.onRange(from, to);
        });
      }
    });
  }
}
Chart.near = new IntersectionObserver(seen => {
  for (const entry of seen) {
    const chart = [...charts].find(each => each.figure === entry.target);
    chart.isNear = entry.isIntersecting;
    chart.draw();
  }
}, {rootMargin: "40% 0px"});
function redraw() {
  for (const chart of charts) { chart.isStale = true; chart.draw(); }
}
document.addEventListener("visibilitychange", () => { for (const chart of charts) chart.draw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// Confirmation ------------------------------------------------------------------------------------------------------------

// Ask; does() is awaited while the dialog stands, and what it refuses is said there.
function confirm(title, text, label, does) {
  const dialog = $("confirm"), yes = $("confirm-yes"), no = $("confirm-no"), error = $("confirm-error");
  set($("confirm-title"), title);
  set($("confirm-text"), text);
  set(yes, label);
  error.hidden = true;
  yes.disabled = false;
  no.onclick = () => dialog.close();
  yes.onclick = async () => {
    yes.disabled = true;
    error.hidden = true;
    try {
      toast(await does());
      dialog.close();
    } catch (refusal) {
      set(error, refusal instanceof Refusal ? `Refused: ${refusal.message}` : String(refusal));
      error.hidden = false;
      yes.disabled = false;
    }
  };
  dialog.showModal();
  no.focus();
}

const send = (method, path, body) => api(path, {method, ...(body === undefined ? {} : {body: JSON.stringify(body)})});

function late(result) {
  return result.workers_late.length ? ` Workers that do not know it yet: ${result.workers_late.join(", ")}.` : "";
}

function drainButton(upstream) {
  if (!may("operator")) return null;
  const {name, drain} = upstream;
  const left = (state.live ? state.live.upstreams : []).filter(each => !each.drain && each.name !== name).length;
  const text = drain
    ? `${name} takes new requests again, at first slowly.`
    : `${name} gets no new requests. The ${number(upstream.in_flight)} in flight there end as they would. ` + (left
      ? `${left === 1 ? "One other upstream takes" : `${left} other upstreams take`} the rest.`
      : "No other upstream takes requests: new ones will be refused.");
  const does = async () => {
    const path = `/api/v1/upstreams/${name.split("/").map(encodeURIComponent).join("/")}`;
    const result = await send("PATCH", path, {drain: !drain});
    return `${name} ${drain ? "takes requests again" : "drains"}.${late(result)}`;
  };
  const label = drain ? "Undrain" : "Drain";
  return {label: `${label} …`, title: `${label} ${name}`, does: () => confirm(`${label} ${name}?`, text, label, does)};
}

// Live --------------------------------------------------------------------------------------------------------------------

const STATES = {
  up: ["● up", "good"], slow_start: ["◔ slow start", "good"], half_open: ["◐ on trial", "warn"], draining: ["◌ draining", "warn"],
  down: ["✕ down", "bad"], ejected: ["✕ ejected", "bad"],
};
function health(upstream) {
  const seen = Object.entries(upstream.states);
  if (!seen.length) return "… not known yet";
  const word = name => (STATES[name] || [name])[0];
  return seen.length === 1 ? word(seen[0][0]) : seen.map(([name, workers]) => `${word(name)} (${workers})`).join(", ");
}
function healthTone(upstream) {
  const tones = Object.keys(upstream.states).map(name => (STATES[name] || ["", "warn"])[1]);
  return tones.includes("bad") ? "bad" : tones.includes("warn") ? "warn" : tones.length ? "good" : "faint";
}
const upstreamColumns = [
  {head: "Upstream", text: row => row.name, name: true},
  {head: "State", text: health, tone: healthTone},
  {head: "", button: drainButton},
  {head: "In flight", text: row => number(row.in_flight), num: true},
  {head: "Requests/s", text: row => number(row.requests_rps), num: true},
  {head: "Failures/s", text: row => number(row.failures_rps), num: true, tone: row => row.failures_rps ? "bad" : ""},
  {head: "Tokens/s out", text: row => number(row.response_tokens_per_s), num: true},
  {head: "Weight", text: row => number(row.weight), num: true},
  {head: "Models", text: row => row.models ? row.models.join(", ") : "not known", name: true},
  {head: "Last error", text: row => row.error || "none", name: true},
];
const modelColumns = [
  {head: "Model", text: row => row.name, name: true},
  {head: "Requests/s", text: row => number(row.requests_rps), num: true},
  {head: "Failures/s", text: row => number(row.failures_rps), num: true, tone: row => row.failures_rps ? "bad" : ""},
  {head: "Tokens/s in", text: row => number(row.request_tokens_per_s), num: true},
  {head: "Tokens/s out", text: row => number(row.response_tokens_per_s), num: true},
  {head: "TTFT p50", text: row => seconds(row.ttft_s[0]), num: true},
  {head: "TTFT p95", text: row => seconds(row.ttft_s[1]), num: true},
];
const ruleColumns = [
  {head: "Rule", text: row => row.name, name: true},
  {head: "Waiting", text: row => number(row.waiting), num: true},
  {head: "Held/s", text: row => number(row.held_rps), num: true},
  {head: "Rejected/s", text: row => number(row.rejected_rps), num: true, tone: row => row.rejected_rps ? "bad" : ""},
  {head: "Adaptive limit", text: row => number(row.limit), num: true},
];

const live = {
  tiles: new Tiles($("live-tiles"), ["Arrivals", "In flight", "Tokens out", "Time to first token", "Time per token", "Failures",
    "Recording", "Workers"]),
  upstreams: new Table($("live-upstreams"), "Upstreams", upstreamColumns, "Waiting for the first second of the live stream."),
  models: new Table($("live-models"), "Models", modelColumns, "No model was asked for in the last 10 s."),
  rules: new Table($("live-rules"), "Shaping rules", ruleColumns,
    "No shaping rule has held or refused a request. Rules are made with shaping.rules in the configuration."),
  charts: {},
};
for (const [name, title, unit, options] of [
  ["arrivals", "Arrivals", "requests/s", {wide: true, empty: "No requests yet. Point a client at the gateway."}],
  ["flight", "In flight", "requests", {empty: "Nothing in flight."}],
  ["tokens", "Tokens", "tokens/s", {empty: "No tokens yet."}],
  ["ttft", "Time to first token", "ms, last 10 s", {empty: "No stream has ended yet."}],
  ["tpot", "Time per output token", "ms, last 10 s", {empty: "No stream has ended yet."}],
  ["failures", "Failures by outcome", "requests/s", {empty: "No failures."}],
  ["origins", "Injected against live", "requests/s ended", {empty: "Nothing ended yet."}],
  ["shaping", "Shaping", "requests", {empty: "Nothing is held or refused."}],
]) live.charts[name] = new Chart($("live-charts"), title, unit, options);

function burstsOf(points) {
  const found = [];
  for (const point of points) {
    const last = found[found.length - 1];
    if (!point.is_burst) continue;
    if (last && point.at - last.end < 3) last.end = point.at;
    else found.push({start: point.at - 1, end: point.at});
  }
  return found.map(({start, end}) => ({from: new Date(start * 1e3), to: new Date(end * 1e3)}));
}

function showLive() {
  const now = state.live;
  if (!now) return;
  const last = now.point, ms = value => missing(value) ? null : value * 1e3;
  const failed = total(last.outcomes_rps) - (last.outcomes_rps?.ok || 0);
  const ended = now.models.reduce((sum, each) => sum + each.requests_rps, 0);
  const failures = now.models.reduce((sum, each) => sum + each.failures_rps, 0);
  const share = ended ? failures / ended : null;
  const ttft = last.ttft_s || [], tpot = last.tpot_s || [];
  const backlog = now.records_in_journal;
  live.tiles.show([
    [number(now.rate_rps), "requests/s", missing(now.baseline_rps) ? "usual: known after half a minute of traffic"
      : `usual ${number(now.baseline_rps)} requests/s`, last.is_burst ? "warn" : ""],
    [number(last.in_flight || 0), "requests", last.shaping_waiting ? `${number(last.shaping_waiting)} held by shaping` : ""],
    [number(last.response_tokens_per_s || 0), "tokens/s", `${number(last.request_tokens_per_s || 0)} tokens/s in`],
    [seconds(ttft[0]), "p50", ttft.length ? `p95 ${seconds(ttft[1])}, p99 ${seconds(ttft[2])}` : "no stream in the last 10 s"],
    [seconds(tpot[0]), "p50", tpot.length ? `p95 ${seconds(tpot[1])}, p99 ${seconds(tpot[2])}` : "no stream in the last 10 s"],
    [percent(share), "", failures ? `${number(failures)} requests/s` : "none in the last 10 s",
      share > 0.05 ? "bad" : share > 0.01 ? "warn" : ""],
    [now.is_database_up ? "● up" : "✕ away", "database", `journal ${bytes(now.journal_bytes)}`
      + (missing(backlog) ? "" : `, ${number(backlog)} not in the database yet`), now.is_database_up ? "" : "bad"],
    [`${now.workers} of ${now.workers_wanted}`, "", now.workers === now.workers_wanted ? "all run" : "some are starting or gone",
      now.workers ? now.workers < now.workers_wanted ? "warn" : "" : "bad"],
  ]);
  $("burst").hidden = !last.is_burst;
  if (last.is_burst !== undefined && last.is_burst && !state.wasBurst)
    toast(`Burst: ${number(now.rate_rps)} requests/s, usual are ${number(now.baseline_rps)}.`);
  state.wasBurst = Boolean(last.is_burst);
  live.upstreams.show(now.upstreams);
  act.upstreams.show(now.upstreams);
  live.models.show(now.models);
  live.rules.show(now.rules);
  if (current().view !== "live") return;

  const from = last.at - state.span;
  const points = [];
  for (const point of state.points) {
    if (point.at < from) continue;
    const before = points[points.length - 1];
    if (before && point.at - before.at > 3) points.push({at: before.at + 1, isGap: true});
    points.push(point);
  }
  const x = points.map(point => new Date(point.at * 1e3));
  const range = [new Date(from * 1e3), new Date(last.at * 1e3)];
  const each = take => points.map(point => point.isGap ? null : take(point) ?? 0);
  const known = take => points.map(point => point.isGap ? null : ms(take(point)) ?? null);
  const c = live.charts;
  c.arrivals.show(x, [{name: "arrivals", y: each(p => p.arrivals_rps), fill: true}],
    {marks: burstsOf(points), now: number(last.arrivals_rps || 0), range});
  c.flight.show(x, [{name: "in flight", y: each(p => p.in_flight), fill: true, step: true}], {now: number(last.in_flight || 0), range});
  c.tokens.show(x, [{name: "answers", y: each(p => p.response_tokens_per_s)},
    {name: "prompts", y: each(p => p.request_tokens_per_s), dash: "dot"}], {range});
  for (const name of ["ttft", "tpot"]) {
    c[name].show(x, ["p50", "p95", "p99"].map((level, place) => ({
      name: level, y: known(p => p[`${name}_s`]?.[place]), dash: ["solid", "dash", "dot"][place]})), {range});
  }
  const outcomes = OUTCOMES.filter(outcome => points.some(point => point.outcomes_rps?.[outcome]));
  c.failures.show(x, outcomes.map(outcome => ({name: outcome, y: each(p => p.outcomes_rps?.[outcome]),
    colour: `series-${(OUTCOMES.indexOf(outcome) + 3) % 8 + 1}`})), {now: number(failed), range, bars: true, names: true});
  c.origins.show(x, [{name: "clients' own", y: each(p => p.live_rps)},
    {name: "injected, replayed, faulted", y: each(p => p.injected_rps), dash: "dash"}], {range});
  c.shaping.show(x, [{name: "waiting", y: each(p => p.shaping_waiting), step: true},
    {name: "held/s", y: each(p => p.shaping_held_rps), dash: "dash"},
    {name: "rejected/s", y: each(p => p.shaping_rejected_rps), dash: "dot", colour: "series-4"}], {range});
}

let stream, lastHeard = Date.now(), awaySince = null;
function connect() {
  if (stream) stream.close();
  stream = new EventSource("/api/v1/live");
  stream.addEventListener("history", event => {
    heard();
    const history = JSON.parse(event.data);
    state.kept = history.kept_s;
    const first = history.points.length ? history.points[0].at : Infinity;
    state.points = [...state.points.filter(point => point.at < first), ...history.points].slice(-state.kept);
  });
  stream.addEventListener("now", event => {
    heard();
    state.live = JSON.parse(event.data);
    state.points.push(state.live.point);
    while (state.points.length > state.kept) state.points.shift();
    const known = new Set([...$("known-models").options].map(option => option.value));
    for (const model of [...state.live.models.map(each => each.name), ...state.live.upstreams.flatMap(each => each.models || [])])
      if (!known.has(model) && model !== "other" && known.size < 200) {
        known.add(model);
        $("known-models").append(el("option", {value: model}));
      }
    if (!document.hidden) showLive();
  });
}
function heard() {
  lastHeard = Date.now();
  if (awaySince !== null) {
    awaySince = null;
    banner("");
    look();
  }
  $("stream").dataset.state = "live";
  set($("stream-text"), "live");
}
setInterval(() => {
  if (Date.now() - lastHeard < 4000) return;
  if (awaySince === null) {
    awaySince = lastHeard;
    $("stream").dataset.state = "away";
    set($("stream-text"), "away");
    banner(`The live stream is away since ${new Date(lastHeard).toLocaleTimeString(undefined, {hour12: false})}: what you see is as it was then. `
      + "Requests do not depend on it. Trying again every few seconds.");
    api("/api/v1/status").catch(() => {});  // says so when the session has ended
  }
  // A browser tries again by itself after a lost connection, but not after an answer that is none.
  if (!stream || stream.readyState === EventSource.CLOSED) connect();
}, 2000);

// The range of History and Failures -----------------------------------------------------------------------------------------

const PRESETS = [["1h", 3600, "1 h", "1 hour"], ["6h", 21600, "6 h", "6 hours"], ["24h", 86400, "24 h", "24 hours"],
  ["7d", 604800, "7 d", "7 days"], ["30d", 2592000, "30 d", "30 days"], ["365d", 31536000, "1 y", "1 year"]];
const local = epoch_s => {
  const at = new Date(epoch_s * 1e3);
  return new Date(at - at.getTimezoneOffset() * 60000).toISOString().slice(0, 19);
};

function current() {
  const [view, query] = location.hash.slice(1).split("?");
  const found = new URLSearchParams(query || "");
  return {view: document.getElementById(`view-${view}`) ? view : "live", query: found};
}
function go(view, query) {
  const text = query.toString();
  const hash = `#${view}${text ? `?${text}` : ""}`;
  if (location.hash === hash) look();
  else location.hash = hash;
}
function rangeOf(query) {
  const preset = PRESETS.find(each => each[0] === query.get("range"));
  const from = Number(query.get("from")), to = Number(query.get("to"));
  if (!preset && from && to && from < to) return {from, to, preset: null};
  const [name, span] = preset || PRESETS[0];
  const now = Math.ceil(Date.now() / 1e3);
  return {from: now - span, to: now, preset: name};
}
function choose(changes) {
  const {view, query} = current();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") query.delete(name);
    else query.set(name, value);
  }
  go(view, query);
}
for (const form of document.querySelectorAll("[data-range]")) {
  const presets = PRESETS.map(([name, , label, words]) => el("button", {
    type: "button", "data-preset": name, "aria-label": words, onclick: () => choose({range: name, from: null, to: null})}, label));
  const from = el("input", {type: "datetime-local", step: "1", name: "from", required: true});
  const to = el("input", {type: "datetime-local", step: "1", name: "to", required: true});
  const origin = el("select", {name: "origin", onchange: () => choose({origin: origin.value === "client" ? null : origin.value})},
    ...ORIGINS.map(([value, label]) => el("option", {value}, label)));
  from.addEventListener("input", () => to.setCustomValidity(""));
  to.addEventListener("input", () => to.setCustomValidity(""));
  form.append(el("span", {class: "presets", role: "group", "aria-label": "Presets"}, ...presets), el("label", {}, "From ", from),
    el("label", {}, "to ", to), el("button", {}, "Show"), el("label", {}, "Requests of ", origin),
    el("span", {class: "faint"}, zone));
  form.addEventListener("submit", event => {
    event.preventDefault();
    const [first, last] = [new Date(from.value) / 1e3, new Date(to.value) / 1e3];
    if (!(first < last)) {
      to.setCustomValidity("The end must be after the beginning.");
      to.reportValidity();
      return;
    }
    choose({range: null, from: first, to: last});
  });
}
function showRange(view, range, query) {
  const form = document.querySelector(`#view-${view} [data-range]`);
  for (const button of form.querySelectorAll("[data-preset]")) button.setAttribute("aria-pressed", String(button.dataset.preset === range.preset));
  if (!form.contains(document.activeElement) || document.activeElement.type !== "datetime-local") {
    form.elements.from.value = local(range.from);
    form.elements.to.value = local(range.to);
  }
  form.elements.origin.value = query.get("origin") || "client";
}

// Only the newest question's answer is shown.
const turns = {};
async function ask(view, noteId, path) {
  const turn = turns[view] = (turns[view] || 0) + 1;
  $(`view-${view}`).setAttribute("aria-busy", "true");
  try {
    const answer = await api(path);
    if (turn !== turns[view]) return null;
    note(noteId, "");
    return answer;
  } catch (error) {
    if (turn === turns[view]) note(noteId, explain(error), true);
    return null;
  } finally {
    if (turn === turns[view]) $(`view-${view}`).removeAttribute("aria-busy");
  }
}

// History -----------------------------------------------------------------------------------------------------------------

const totalColumns = [
  {head: "Name", text: row => row.name, name: true},
  {head: "Requests", text: row => number(row.requests), num: true},
  {head: "Failed", text: row => percent(row.requests ? row.failures / row.requests : null), num: true},
  {head: "Tokens out", text: row => number(row.response_tokens), num: true},
];
const zoomed = (from, to) => choose({range: null, from: Math.floor(from), to: Math.ceil(to)});
const past = {
  tiles: new Tiles($("history-tiles"), ["Requests", "Mean rate", "Failures", "Tokens in", "Tokens out", "Step"]),
  models: new Table($("history-models"), "Models", totalColumns, "No requests in this time."),
  upstreams: new Table($("history-upstreams"), "Upstreams", totalColumns, "No requests in this time."),
  charts: {},
};
for (const [name, title, unit] of [
  ["requests", "Requests", "requests/s"], ["failures", "Failures by outcome", "requests"], ["tokens", "Tokens", "tokens/s"],
  ["ttft", "Time to first token", "ms"], ["tpot", "Time per output token", "ms"], ["e2e", "End to end", "s"],
]) past.charts[name] = new Chart($("history-charts"), title, unit, {onRange: zoomed});

async function showHistory(query) {
  const range = rangeOf(query), origin = query.get("origin") || "client";
  showRange("history", range, query);
  const wanted = new URLSearchParams({from: range.from, to: range.to, origin});
  const found = await ask("history", "history-note", `/api/v1/history?points=120&${wanted}`);
  showExport(wanted);
  if (!found) return;
  const step = found.step_s, now = Date.now() / 1e3;
  const points = new Map(found.points.map(point => [point.at, point]));
  const steps = [];
  for (let at = Math.floor(found.start / step) * step; at < Math.min(found.end, now) && steps.length < 2500; at += step)
    steps.push({at, span: Math.max(1, Math.min(step, now - at)), ...(points.get(at) || {})});
  const sum = take => steps.reduce((all, point) => all + (take(point) || 0), 0);
  const requests = sum(p => p.requests), failures = sum(p => p.failures);
  const span = Math.max(1, Math.min(found.end, now) - found.start);
  past.tiles.show([
    [number(requests), "", `of ${ORIGINS.find(each => each[0] === origin)?.[1] || origin}`],
    [number(requests / span), "requests/s", ""],
    [percent(requests ? failures / requests : null), "", `${number(failures)} requests`, requests && failures / requests > 0.05 ? "bad" : ""],
    [number(sum(p => p.request_tokens)), "tokens", ""],
    [number(sum(p => p.response_tokens)), "tokens", ""],
    [seconds(step), "", "each point; drag over a chart to look closer"],
  ]);
  if (!requests) note("history-note", "No requests in this range. Choose a longer one, or other requests' origin.");
  const x = steps.map(point => new Date((point.at + step / 2) * 1e3));
  const shown = [new Date(found.start * 1e3), new Date(found.end * 1e3)];
  const c = past.charts;
  c.requests.show(x, [{name: "ended well", y: steps.map(p => ((p.requests || 0) - (p.failures || 0)) / p.span), colour: "series-1"},
    {name: "failed", y: steps.map(p => (p.failures || 0) / p.span), colour: "series-4"}], {bars: true, range: shown});
  const outcomes = OUTCOMES.filter(outcome => steps.some(point => point.outcomes?.[outcome]));
  c.failures.show(x, outcomes.map(outcome => ({name: outcome, y: steps.map(p => p.outcomes?.[outcome] || 0),
    colour: `series-${(OUTCOMES.indexOf(outcome) + 3) % 8 + 1}`})), {bars: true, range: shown, names: true});
  c.tokens.show(x, [{name: "answers", y: steps.map(p => (p.response_tokens || 0) / p.span)},
    {name: "prompts", y: steps.map(p => (p.request_tokens || 0) / p.span), dash: "dot"}], {range: shown});
  for (const [name, factor] of [["ttft", 1e3], ["tpot", 1e3], ["e2e", 1]]) {
    c[name].show(x, found.quantiles.map((level, place) => ({name: `p${Math.round(level * 100)}`, dash: ["solid", "dash", "dot"][place],
      y: steps.map(p => missing(p[`${name}_s`]?.[place]) ? null : p[`${name}_s`][place] * factor)})), {range: shown});
  }
  past.models.show(found.models);
  past.upstreams.show(found.upstreams);
  const known = [...$("known-models").options].map(option => option.value);
  for (const {name} of found.models) if (!known.includes(name) && name !== "(unknown)") $("known-models").append(el("option", {value: name}));
  set($("export-note"), `${number(requests)} requests${failures ? `, ${number(failures)} of them failures` : ""}`);
}
function showExport(wanted) {
  const form = $("export").elements;
  const query = new URLSearchParams(wanted);
  query.set("format", form.format.value);
  query.set("failures", form.failures.value);
  if (form.format.value.startsWith("burstgpt")) query.set("timezone", zone.includes("/") ? zone : "UTC");
  $("export-link").href = `/api/v1/export?${query}`;
}
$("export").addEventListener("change", () => {
  const {query} = current(), range = rangeOf(query);
  showExport(new URLSearchParams({from: range.from, to: range.to, origin: query.get("origin") || "client"}));
});
$("export").addEventListener("submit", event => event.preventDefault());

// Failures ----------------------------------------------------------------------------------------------------------------

const PAGE = 50;
const failures = {
  rows: [],
  table: new Table($("failures-table"), "Failed requests", [
    {head: "Time", link: true, button: row => ({label: when(row.received_at), title: `Record of ${when(row.received_at)}`, does: () => openRecord(row)})},
    {head: "Outcome", text: row => row.outcome, tone: () => "bad"},
    {head: "Status", text: row => missing(row.status) ? "none" : String(row.status), num: true},
    {head: "Error", text: row => row.error_type || "–", name: true},
    {head: "Model", text: row => row.model || "–", name: true},
    {head: "Upstream", text: row => row.upstream || "none reached", name: true},
    {head: "Took", text: row => seconds(row.elapsed_s), num: true},
    {head: "Tokens in", text: row => number(row.request_tokens), num: true},
    {head: "Tokens out", text: row => number(row.response_tokens), num: true},
  ], "No failures here."),
};
$("failure-filter").elements.outcome.append(...OUTCOMES.map(value => el("option", {value}, value)));

async function showFailures(query, older = false) {
  const range = rangeOf(query), form = $("failure-filter").elements;
  if (!older) {
    showRange("failures", range, query);
    form.outcome.value = query.get("outcome") || "";
    form.model.value = query.get("model") || "";
  }
  const wanted = new URLSearchParams({failures: "true", limit: PAGE, from: range.from, to: range.to, origin: query.get("origin") || "client"});
  if (query.get("outcome")) wanted.set("outcome", query.get("outcome"));
  if (query.get("model")) wanted.set("model", query.get("model"));
  const last = failures.rows[failures.rows.length - 1];
  if (older && last) { wanted.set("before", last.received_at); wanted.set("before_id", last.request_id); }
  const found = await ask("failures", "failures-note", `/api/v1/requests?${wanted}`);
  if (!found) return;
  failures.rows = older ? [...failures.rows, ...found] : found;
  failures.table.show(failures.rows, row => row.request_id);
  failures.table.empty.textContent = "No failures in this range with this filter. Choose a longer range, or another filter.";
  $("failures-more").hidden = found.length < PAGE;
}
$("failures-more").addEventListener("click", () => showFailures(current().query, true));
$("failure-filter").addEventListener("submit", event => {
  event.preventDefault();
  const form = event.target.elements;
  choose({outcome: form.outcome.value, model: form.model.value.trim()});
});

function field(name, value) {
  if (missing(value)) return "not known";
  if (name === "received_at") return `${when(value, true)} (${zone})`;
  if (name.endsWith("_s")) return seconds(value);
  if (name.endsWith("_tokens")) return `${number(value)} tokens`;
  if (name === "agreement") return percent(value);
  if (Array.isArray(value)) return value.join(", ") || "none";
  return value === "" ? "empty" : String(value);
}
async function openRecord(row) {
  set($("record-title"), `${row.outcome}: ${row.model || "no model"}`);
  const show = record => $("record-fields").replaceChildren(
    ...Object.entries(record).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {class: missing(value) ? "faint" : ""}, field(name, value))]));
  show(row);
  $("record").showModal();
  try { show(await api(`/api/v1/requests/${encodeURIComponent(row.request_id)}`)); } catch { /* the row stands */ }
}
$("record-close").addEventListener("click", () => $("record").close());
for (const dialog of document.querySelectorAll("dialog"))
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });

// Act ---------------------------------------------------------------------------------------------------------------------

const isOver = injection => !["starting", "running"].includes(injection.state);
function planText(plan) {
  const parts = [plan.preset || "", plan.rate_rps ? `${number(plan.rate_rps)} requests/s` : "", plan.shape ? `shape ${plan.shape}` : "",
    plan.trace || plan.profile || "", plan.duration_s ? `for ${seconds(plan.duration_s)}` : "", plan.faults || plan.failures_like ? "faults" : "",
    plan.model || ""];
  return parts.filter(Boolean).join(", ");
}
const act = {
  injections: new Table($("injections"), "Injections", [
    {head: "Run", text: row => row.run_id, name: true},
    {head: "State", text: row => isOver(row) ? row.state : `▶ ${row.state}`, tone: row => isOver(row) ? row.state === "failed" ? "bad" : "" : "warn"},
    {head: "", button: row => isOver(row) || !may("operator") ? null : {label: "Stop …", title: `Stop ${row.run_id}`, does: () => confirm(
      `Stop ${row.run_id}?`, `Nothing more is sent. The ${number(row.in_flight)} requests in flight are aborted.`, "Stop",
      async () => { await send("DELETE", `/api/v1/injections/${encodeURIComponent(row.run_id)}`); showAct(); return `${row.run_id} was stopped.`; })}},
    {head: "Plan", text: row => planText(row.plan), long: true},
    {head: "Sent", text: row => number(row.sent), num: true},
    {head: "Ok", text: row => number(row.ok), num: true},
    {head: "Failed", text: row => number(row.failed), num: true, tone: row => row.failed ? "bad" : ""},
    {head: "Requests/s", text: row => number(row.rate_rps), num: true},
    {head: "Started", text: row => when(row.started_at)},
    {head: "By", text: row => row.actor, name: true},
    {head: "Ended because", text: row => row.reason || "–", long: true},
  ], "No injection was started since the control plane began."),
  upstreams: new Table($("act-upstreams"), "Upstreams", upstreamColumns.slice(0, 5), "Waiting for the live stream."),
};
async function showAct() {
  const found = await ask("act", "act-note", "/api/v1/injections");
  if (found) act.injections.show(found, row => row.run_id);
  $("act-note").hidden = !$("act-note").textContent;
  if (!found) return;
  if (!may("operator")) {
    set($("act-note"), state.readOnly ? "The control plane is read-only (control.read_only): nothing can be started or stopped here."
      : `Your role is ${state.role}: an operator can start and stop.`);
    $("act-note").hidden = false;
  } else if (state.isInjectionAllowed === false) {
    set($("act-note"), "Injections are switched off: set injection.allowed to true in the configuration to use them.");
    $("act-note").hidden = false;
  }
}
const injectForm = $("inject");
function showKind() {
  const isRate = injectForm.elements.kind.value === "rate";
  for (const label of injectForm.querySelectorAll("[data-kind]")) {
    label.hidden = !isRate;
    label.querySelector("input").disabled = !isRate;
  }
  injectForm.elements.duration_s.value = isRate ? 30 : 110;
}
injectForm.elements.kind.addEventListener("change", showKind);
showKind();
injectForm.addEventListener("submit", event => {
  event.preventDefault();
  const form = injectForm.elements, isRate = form.kind.value === "rate", value = name => Number(form[name].value);
  const plan = {model: form.model.value.trim(), duration_s: value("duration_s"), request_tokens: value("request_tokens"),
    response_tokens: value("response_tokens"), ...(isRate ? {rate_rps: value("rate_rps"), shape: value("shape")} : {preset: "k-ramp"})};
  const rate = isRate ? `${number(plan.rate_rps)} requests/s on average (about ${number(plan.rate_rps * plan.duration_s)} in all; Gamma shape ${plan.shape})`
    : "2, 4, 8, 16, 32, 64 requests/s and back";
  confirm("Start an injection?",
    `The gateway sends itself ${rate} for ${seconds(plan.duration_s)}, asking for ${plan.model} with ${number(plan.request_tokens)} prompt and `
    + `${number(plan.response_tokens)} answer tokens each.\nNow clients send ${state.live ? number(state.live.rate_rps) : "an unknown number of"} requests/s. `
    + "Guard rails stop it when clients suffer; you can stop it here at any time.", "Start",
    async () => {
      const status = await send("POST", "/api/v1/injections", plan);
      showAct();
      return `${status.run_id} has started.`;
    });
});
setInterval(() => { if (current().view === "act" && !document.hidden) showAct(); }, 2000);

// Config and Audit ----------------------------------------------------------------------------------------------------------

const NEEDS = {live: "at once", restart: "with a restart", stop: "with a stop and a start"};
const config = {
  rows: [],
  table: new Table($("config-table"), "Settings", [
    {head: "Setting", text: row => row.key},
    {head: "Value", text: row => row.value, long: true},
    {head: "Changed here", text: row => row.is_steered ? "◆ yes" : "no", tone: row => row.is_steered ? "warn" : "faint"},
    {head: "A change takes effect", text: row => NEEDS[row.changes] || row.changes},
  ], "No setting matches."),
  history: new Table($("config-history"), "Changes", [
    {head: "Revision", text: row => `${row.number}${row.isInForce ? " (in force)" : ""}`},
    {head: "", button: row => row.isInForce || !may("admin") ? null : {label: "Roll back …", title: `Roll back to revision ${row.number}`, does: () => confirm(
      `Back to revision ${row.number}?`,
      row.number ? `What was changed after it is taken back; in force is then:\n${lines(row.values)}`
        : "All that was changed here is taken back: the configuration alone is in force.", "Roll back",
      async () => { const result = await send("POST", `/api/v1/config/rollback/${row.number}`); look(); return `Revision ${result.revision} is in force.${late(result)}`; })}},
    {head: "Time", text: row => row.number ? when(row.at) : "–"},
    {head: "By", text: row => row.actor || "–", name: true},
    {head: "Why", text: row => row.note || "–", long: true},
    {head: "In force with it", text: row => row.number ? lines(row.values) : "the configuration alone", long: true},
    {head: "Outlives a start", text: row => (row.kept || []).join(", ") || "nothing", long: true},
  ], "Nothing was changed here. Settings are changed through POST /api/v1/config, upstreams with the buttons of Act."),
};
const lines = values => Object.entries(values).map(([key, value]) => `${key}: ${value}`).join("\n") || "the configuration alone";

function filterConfig() {
  const text = $("config-find").value.trim().toLowerCase(), steered = $("config-steered").checked;
  config.table.show(config.rows.filter(row => (!steered || row.is_steered) && `${row.key} ${row.value}`.toLowerCase().includes(text)), row => row.key);
}
$("config-find").addEventListener("input", filterConfig);
$("config-steered").addEventListener("change", filterConfig);
async function showConfig() {
  const found = await ask("config", "config-note", "/api/v1/config");
  if (!found) return;
  config.rows = found.settings;
  filterConfig();
  try {
    const history = await api("/api/v1/config/history");
    const all = history.length ? [...history, {number: 0, values: {}, actor: "", note: "before the first change"}] : [];
    config.history.show(all.map(row => ({...row, isInForce: row.number === found.revision})), row => row.number);
  } catch (error) {
    note("config-note", explain(error), true);
  }
}
const audit = new Table($("audit-table"), "Audit trail", [
  {head: "Time", text: row => when(new Date(row.at) / 1e3)},
  {head: "Who", text: row => row.actor, name: true},
  {head: "What", text: row => row.action},
  {head: "Detail", text: row => Object.entries(row.detail).map(([key, value]) => `${key}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ") || "–", long: true},
], "Nothing was changed yet. What is changed through the API, the command line or this page is written down here.");
async function showAudit() {
  const found = await ask("audit", "audit-note", "/api/v1/audit?limit=200");
  if (found) audit.show(found.map((row, place) => ({...row, key: `${row.at} ${row.action} ${place}`})), row => row.key);
}

// Views -------------------------------------------------------------------------------------------------------------------

const VIEWS = {live: showLive, history: showHistory, failures: showFailures, act: showAct, config: showConfig, audit: showAudit};
let shownView = null;
function look() {
  const {view, query} = current();
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `view-${view}`;
  for (const link of document.querySelectorAll("nav a")) {
    const name = link.hash.slice(1).split("?")[0];
    if (name === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    // History and Failures keep one range.
    if (["history", "failures"].includes(name) && ["history", "failures"].includes(view)) {
      const kept = new URLSearchParams([...query].filter(([key]) => ["range", "from", "to", "origin"].includes(key)));
      link.hash = `${name}${kept.size ? `?${kept}` : ""}`;
    }
  }
  document.title = `${document.querySelector(`#view-${view} h1`).textContent} · burstgate`;
  if (view === "live") {
    const span = Number(query.get("span"));
    state.span = [120, 300, 900].includes(span) ? span : 300;
    $("live-span").value = String(state.span);
  }
  if (shownView !== null && shownView !== view) { scrollTo(0, 0); $("main").focus({preventScroll: true}); }
  shownView = view;
  VIEWS[view](query);
}
addEventListener("hashchange", look);
$("live-span").addEventListener("change", event => choose({span: event.target.value}));

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  set($("theme"), {auto: "◐ Auto", light: "○ Light", dark: "● Dark"}[name]);
  $("theme").setAttribute("aria-label", `Theme: ${name}. Change it`);
  $("theme").dataset.theme = name;
  redraw();
}
let savedTheme = "auto";
try { savedTheme = localStorage.getItem("burstgate-theme") || "auto"; } catch { /* storage is off: the system's theme */ }
theme(THEMES.includes(savedTheme) ? savedTheme : "auto");
$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf($("theme").dataset.theme) + 1) % THEMES.length];
  theme(next);
  try { localStorage.setItem("burstgate-theme", next); } catch { /* it holds for this page */ }
});

// What these offer depends on who looks.
const dependsOnRole = () => ["act", "config"].includes(current().view);
async function begin() {
  set($("footer"), `times in ${zone}`);
  connect();
  if (!dependsOnRole()) look();
  try {
    const [status, who] = await Promise.all([api("/api/v1/status"), api("/api/v1/whoami").catch(error => {
      if (error.status === 404) return {name: "local", role: "admin"};
      throw error;
    })]);
    set($("gateway"), status.gateway);
    state.readOnly = Boolean(status.read_only);
    state.role = who.role;
    $("logout").hidden = who.name === "local";
    set($("footer"), `times in ${zone} · ${state.readOnly ? "read-only" : who.role}${who.name === "local" ? "" : ` (${who.name})`}`);
    const settings = await api("/api/v1/config");
    const allowed = settings.settings.find(row => row.key === "injection.allowed");
    state.isInjectionAllowed = allowed ? allowed.value.toLowerCase() === "true" : undefined;
  } catch (error) {
    if (error.status !== 401) banner(explain(error));
  }
  for (const button of document.querySelectorAll("[data-needs]")) button.hidden = !may(button.dataset.needs);
  if (dependsOnRole()) look();
}
begin();
