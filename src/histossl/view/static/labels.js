// Labels by hand: write one for the chosen slides into slides.csv, probe what is there, and name what to label next.
import { byId, element, fetched, listed } from "./common.js";
import { draw } from "./map.js";
import { state } from "./state.js";

let undo = null, renew = () => {};

// The slides that a label would be written for.
function meant() {
  if (state.picked.size) return [...state.picked].sort((a, b) => a - b);
  return state.shown.length < state.cohort.names.length ? state.shown : [];
}

export function offerLabels(columns) {
  renew = columns;
  const { cohort } = state, closed = cohort.readonly;
  byId("label-form").hidden = closed;
  byId("label-closed").hidden = !closed;
  byId("label-column").value = cohort.reserved.includes("label") ? "my_label" : "label";
  labelled();
}

const own = () => Object.keys(state.cohort.columns).filter((name) => ![...state.cohort.technical, ...state.cohort.reserved, ...(state.cohort.guessed ?? [])].includes(name));

export function labelled() {
  if (!state.cohort) return;
  const slides = meant(), column = byId("label-column").value.trim(), values = state.cohort.columns[column] ?? [];
  byId("label-what").textContent = slides.length ? `For the ${count(slides.length)} ${state.picked.size ? "picked" : "chosen"}.`
    : "First choose slides: a lasso, the filter, a class of the legend, or Ctrl and click (Space with the keyboard) for single ones.";
  byId("label-write").disabled = !slides.length || !column;
  byId("label-columns").replaceChildren(...own().map((name) => element("option", { value: name })));
  byId("label-values").replaceChildren(...[...new Set(values)].filter(Boolean).sort().slice(0, 30).map((value) => element("option", { value })));
  byId("probe").hidden = !state.places.length;
}

const count = (number) => `${number.toLocaleString("en")} ${number === 1 ? "slide" : "slides"}`;

// ---- writing

function ask() {
  const column = byId("label-column").value.trim(), text = byId("label-value").value.trim(), slides = meant();
  if (!column || !slides.length) return;
  const values = state.cohort.columns[column], old = new Map();
  for (const slide of slides) {
    const value = values?.[slide] ?? "";
    if (value && value !== text) old.set(value, (old.get(value) ?? 0) + 1);
  }
  const replaced = [...old].map(([value, number]) => `${value} (${number})`).join(", ");
  byId("ask-what").textContent = text ? `Write “${text}” into the column “${column}” of slides.csv for ${count(slides.length)}?` : `Take away the label of ${count(slides.length)} in the column “${column}” of slides.csv?`;
  byId("ask-old").textContent = replaced ? `This replaces the labels that are there: ${replaced}.` : values ? "No label is replaced." : "The column is new.";
  byId("ask-yes").onclick = () => { byId("ask").close(); write(column, Object.fromEntries(slides.map((slide) => [slide, text]))); };
  byId("ask").showModal();
}

async function write(column, labels, undoing = false) {
  const said = byId("label-said");
  said.classList.remove("bad");
  try {
    const answer = await fetched("labels", "json", undefined, { column, labels });
    const values = state.cohort.columns[column] ??= state.cohort.names.map(() => "");
    for (const [slide, text] of Object.entries(labels)) values[slide] = text;
    undo = undoing ? null : { column, labels: answer.before };
    said.textContent = `${undoing ? "Undone for" : "Written for"} ${count(Object.keys(labels).length)}. The table as it was before: ${answer.backup}.`;
    state.marked = state.marked.filter((slide) => !labels[slide]);
    renew(column);
    byId("colour").dispatchEvent(new Event("change"));
  } catch (error) {
    said.textContent = error.message;
    said.classList.add("bad");
  }
  byId("undo").hidden = !undo;
}

// ---- the probe

async function probe() {
  const column = byId("label-column").value.trim(), box = byId("probed");
  if (!(column in state.cohort.columns)) { box.replaceChildren(element("p", { class: "note bad" }, `There is no column “${column}” with labels yet.`)); return; }
  box.replaceChildren(element("p", { class: "note" }, "…"));
  try {
    const found = await fetched(`probe.json?column=${encodeURIComponent(column)}`);
    state.marked = found.next;
    if (found.classes.length > 1) {
      const name = `${column}, guessed`;
      state.cohort.columns[name] = found.predicted.map((value) => value ?? "");
      state.cohort.guessed = [...new Set([...(state.cohort.guessed ?? []), name])];
      renew();
    }
    tell(box, column, found);
  } catch (error) {
    box.replaceChildren(element("p", { class: "note bad" }, error.message));
  }
  draw();
}

function tell(box, column, { classes, counts, patients, auroc, folds, why, predicted, sure, next }) {
  const of = classes.map((name, k) => `${name} ${counts[k]}`).join(", ") || "none";
  const short = (value) => value.toFixed(2).replace(/^0/, "");
  box.replaceChildren(...[
    element("p", { class: auroc ? "figure" : "note" }, auroc ? `AUROC ${short(auroc[0])} (${short(auroc[1])} to ${short(auroc[2])})` : `No figure yet: ${why}.`),
    element("p", { class: "note" }, `Labels: ${of}, of ${patients} ${patients === 1 ? "patient" : "patients"}.${auroc ? ` ${folds} folds of whole patients.` : ""}`),
    auroc ? element("p", { class: "note" }, "Slides that were chosen on this map are easier than others: such a figure flatters. The one to publish comes from histossl probe, on labels that were given without the map.") : null,
    classes.length > 1 ? element("p", { class: "note" }, `Colour the map by “${column}, guessed” to see what the classifier says of every slide.`) : null,
    element("h3", {}, next.length ? "Label these next" : "Every slide with a vector has a label."),
    next.length === 0 ? null : element("p", { class: "note" }, "The classifier is unsure of them, and each stands for many others. Their numbers are on the map."),
    element("ol", { class: "list" }, ...next.map((slide, k) => listed(slide, `${k + 1}. ${state.cohort.names[slide]}`, "", predicted[slide] === null ? "" : `guessed: ${predicted[slide]}, ${short(sure[slide])}`, false))),
    next.length ? element("button", { type: "button", onclick: () => { state.picked = new Set(next); byId("filter").dispatchEvent(new Event("input")); } }, "Pick them") : null,
  ].filter(Boolean));
}

byId("label-form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
byId("label-column").addEventListener("input", labelled);
byId("ask-no").addEventListener("click", () => byId("ask").close());
byId("undo").addEventListener("click", () => undo && write(undo.column, undo.labels, true));
byId("probe").addEventListener("click", probe);
