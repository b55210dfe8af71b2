// The page of all slides: their list, and how the map is coloured and filtered.
import { CLASSES, byId, dark, element, fetched, listed, ramp, rgb, saved } from "./common.js";
import { labelled, offerLabels } from "./labels.js";
import { canvas, draw, newColours, on, paint, point, setLasso, whole, within } from "./map.js";
import { asked, picture, remember, restore } from "./share.js";
import { state } from "./state.js";

const LISTED = 200, SAID = 60;
let texts = [];

async function start() {
  const wanted = asked();
  const cohort = state.cohort = await fetched("cohort.json");
  document.title = `${cohort.title} – histossl`;
  byId("title").textContent = cohort.title;
  byId("title").className = "";
  byId("map").append(...Object.entries(cohort.maps).map(([name, said]) => element("option", { value: name }, said)));
  if (wanted.get("map") in cohort.maps) byId("map").value = wanted.get("map");
  byId("filter").value = wanted.get("q") ?? "";
  columns(wanted.get("colour") ?? telling() ?? "");
  recolour();
  const chosen = [...byId("legend").querySelectorAll("button")].find((button) => button.dataset.value === wanted.get("class"));
  offerLabels(columns);
  await remap();
  if (restore(wanted)) state.inRing = within(state.ring);
  chosen?.click();
  choose();
  document.querySelector("main").removeAttribute("aria-busy");
  document.documentElement.dataset.ready = "atlas";
}

// The columns that colour the map, and what is searched in.
function columns(colour = byId("colour").value) {
  const names = Object.keys(state.cohort.columns);
  byId("colour").replaceChildren(element("option", { value: "" }, "one colour"), ...names.map((name) => element("option", { value: name }, name)));
  byId("colour").value = names.includes(colour) ? colour : "";
  const all = [state.cohort.names, ...Object.values(state.cohort.columns)];
  texts = state.cohort.names.map((_, slide) => all.map((values) => values[slide]).join(" ").toLowerCase());
}

async function remap() {
  const name = byId("map").value;
  if (!name) {
    document.body.classList.add("unmapped");
  } else {
    byId("stage").classList.add("busy");
    byId("told").textContent = "The map is being made …";
    try {
      const found = await fetched(`maps/${name}.json`);
      if (byId("map").value !== name) return;
      state.places = found.places;
      state.told = found.told;
    } finally {
      if (byId("map").value === name) byId("stage").classList.remove("busy");
    }
  }
  state.ring = state.inRing = null;
  whole();
  choose();
}

function classes(name) {
  const counts = new Map();
  for (const value of state.cohort.columns[name]) if (value) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
}

// The first column of a few classes: of labels and predictions, else one that the user added, else any.
function telling() {
  const { columns: of, technical } = state.cohort, names = Object.keys(of).filter((name) => classes(name).length > 1);
  const few = names.filter((name) => classes(name).length <= CLASSES);
  return few.find((name) => !technical.includes(name)) ?? few[0] ?? names[0];
}

// How a column colours the map: one colour per class, or a colour ramp for numbers.
function recolour() {
  const name = byId("colour").value, legend = byId("legend");
  legend.replaceChildren();
  state.onlyClass = null;
  byId("legend-title").textContent = name;
  byId("legend-title").hidden = !name;
  if (!name) state.colours = null;
  else {
    const values = state.cohort.columns[name], ranked = classes(name);
    const numbers = values.map((value) => (value === "" ? NaN : Number(value)));
    const known = numbers.filter(Number.isFinite);
    if (ranked.length > CLASSES && known.length === values.filter(Boolean).length) numbered(numbers, known);
    else classed(values, ranked);
  }
  labelled();
  choose();
}

function numbered(numbers, known) {
  const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  state.colours = { share: numbers.map((value) => (value - low) / (high - low || 1)) };
  const strip = element("canvas", { class: "ramp", width: 256, height: 1, "aria-hidden": "true" }), context = strip.getContext("2d");
  for (let k = 0; k < 256; k++) { context.fillStyle = rgb(ramp(k / 255)); context.fillRect(k, 0, 1, 1); }
  byId("legend").append(element("li", {}, strip, element("div", { class: "ends" }, element("span", {}, String(low)), element("span", {}, String(high)))));
}

function classed(values, ranked) {
  const first = ranked.slice(0, CLASSES).map(([value]) => value).sort(), legend = byId("legend");
  const kinds = new Map(first.map((value, kind) => [value, kind])), counts = new Map(ranked);
  state.colours = { kind: values.map((value) => (value === "" ? null : kinds.get(value) ?? CLASSES)) };
  const rows = first.map((value, kind) => [value, kind, counts.get(value)]);
  const others = ranked.slice(CLASSES).reduce((sum, [, count]) => sum + count, 0);
  if (others) rows.push([`${ranked.length - CLASSES} others`, CLASSES, others]);
  const none = values.filter((value) => value === "").length;
  if (none) rows.push(["not known", null, none]);
  for (const [label, kind, count] of rows) {
    const sample = element("canvas", { width: 28, height: 28, "aria-hidden": "true", class: "sample" });
    const button = element("button", { type: "button", "aria-pressed": "false", "data-value": label, onclick: () => {
      state.onlyClass = state.onlyClass?.kind === kind ? null : { kind, label };
      for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && state.onlyClass !== null));
      choose();
    } }, sample, element("span", {}, label), element("small", {}, String(count)));
    button.sample = () => {
      const context = sample.getContext("2d");
      context.clearRect(0, 0, 28, 28);
      paint(context, 14, 14, 9, { kind });
    };
    button.sample();
    legend.append(element("li", {}, button));
  }
}

function choose() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean), { cohort, onlyClass, colours, inRing } = state;
  state.shown = [];
  for (let slide = 0; slide < cohort.names.length; slide++) {
    if (words.every((word) => texts[slide].includes(word)) && (!onlyClass || !colours?.kind || colours.kind[slide] === onlyClass.kind)
      && (!inRing || inRing.has(slide))) state.shown.push(slide);
  }
  state.order = state.shown.filter((slide) => state.places[slide]);
  const all = cohort.names.length, count = state.shown.length;
  byId("count").textContent = `${count === all ? "" : `${count} of `}${all} ${all === 1 ? "slide" : "slides"}`;
  byId("list-title").textContent = count === all ? "Slides" : `${count} chosen`;
  byId("clear").hidden = !inRing && !state.picked.size;
  byId("more").textContent = count > LISTED ? `and ${count - LISTED} more: filter to see them` : "";
  const column = byId("colour").value;
  byId("list").replaceChildren(...state.shown.slice(0, LISTED).map((slide) => {
    const failed = cohort.failed[slide], value = column && cohort.columns[column][slide];
    const label = failed ?? (value ? `${column}: ${value}` : "");
    return listed(slide, cohort.names[slide], "", failed ? label.slice(0, SAID) : label, Boolean(failed));
  }));
  labelled();
  remember();
  draw();
}

function trouble(error) {
  byId("count").textContent = error.message;
  byId("count").classList.add("bad");
  document.documentElement.dataset.ready = "trouble";
}

// ---- the tools

on({ open(slide) { remember(true); location.href = `slides/${slide}`; }, chosen: choose, moved: () => remember() });
byId("tools").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", choose);
byId("colour").addEventListener("change", recolour);
byId("map").addEventListener("change", () => remap().catch(trouble));
byId("lasso").addEventListener("click", () => setLasso(byId("lasso").getAttribute("aria-pressed") !== "true"));
byId("whole").addEventListener("click", whole);
byId("picture").addEventListener("click", picture);
byId("clear").addEventListener("click", () => { state.ring = state.inRing = null; state.picked.clear(); choose(); });
byId("list").addEventListener("pointerover", (event) => {
  const slide = event.target.closest("a")?.dataset.slide;
  if (slide !== undefined && state.places[slide]) { point(null); state.under = Number(slide); draw(); }
});
byId("save").addEventListener("click", () => {
  const plain = (value) => (/^[=+@\t\r-]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value); // so that a spreadsheet does not read it as a formula
  const cell = (value) => (/[",\n\r]/.test(value) ? `"${plain(value).replaceAll('"', '""')}"` : plain(value));
  const { names, columns: of } = state.cohort, heads = Object.keys(of);
  const rows = [["slide_id", ...heads], ...state.shown.map((slide) => [names[slide], ...heads.map((name) => of[name][slide])])];
  saved(new Blob([rows.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" }), "slides.csv");
});
dark.addEventListener("change", () => { for (const button of document.querySelectorAll("#legend button")) button.sample(); newColours(); });
let size = null;
new ResizeObserver(() => {
  const box = canvas.getBoundingClientRect();
  if (size && document.documentElement.dataset.ready) { // what was in the middle stays there
    state.view.x += (box.width - size.width) / 2;
    state.view.y += (box.height - size.height) / 2;
  }
  size = box;
  draw();
}).observe(canvas);

start().catch(trouble);
