// The address follows what is shown, so that "back", a bookmark and a colleague find it; and the map as a picture.
import { byId, ink, saved } from "./common.js";
import { canvas } from "./map.js";
import { state } from "./state.js";

const CALM = 250, CORNERS = 60; // ms between two changes of the address; corners of a lasso that it holds
let due = 0;

export const asked = () => new URLSearchParams(location.hash.slice(1));

// Places on the map are whole thousandths of it, from its middle.
export function remember(now = false) {
  clearTimeout(due);
  if (!document.documentElement.dataset.ready) return;
  if (!now) { due = setTimeout(() => remember(true), CALM); return; }
  const told = new URLSearchParams(), add = (name, value) => { if (value) told.set(name, value); };
  add("map", byId("map").value);
  add("colour", byId("colour").value);
  add("class", state.onlyClass?.label);
  add("q", byId("filter").value);
  const { scale, x, y } = state.view, box = canvas.getBoundingClientRect();
  if (state.fit && Math.abs(Math.log(scale / state.fit)) > 0.01) add("at", [(box.width / 2 - x) / scale, (box.height / 2 - y) / scale, scale / state.fit].map(short).join(","));
  if (state.ring) add("ring", thinned(state.ring).flat().map(short).join(","));
  history.replaceState(null, "", `#${told}`);
}

const short = (value) => Number(value.toPrecision(5));
const thinned = (ring) => ring.filter((_, k) => k % Math.ceil(ring.length / CORNERS) === 0);

// Returns whether the address holds a lasso.
export function restore(told) {
  const numbers = (name) => (told.get(name) ?? "").split(",").map(Number);
  const at = numbers("at"), ring = numbers("ring");
  if (at.length === 3 && at.every(Number.isFinite) && at[2] > 0) {
    const box = canvas.getBoundingClientRect(), scale = state.fit * at[2];
    state.view = { scale, x: box.width / 2 - at[0] * scale, y: box.height / 2 - at[1] * scale };
  }
  if (ring.length < 6 || !ring.every(Number.isFinite)) return false;
  state.ring = ring.flatMap((value, k) => (k % 2 ? [] : [[value, ring[k + 1] ?? 0]]));
  return true;
}

// The map as it is on the screen, its legend beside it.
export function picture() {
  const ratio = devicePixelRatio || 1, box = canvas.getBoundingClientRect(), side = 220, top = 44;
  const sheet = Object.assign(document.createElement("canvas"), { width: (box.width + side) * ratio, height: (box.height + top) * ratio });
  const context = sheet.getContext("2d"), font = (style) => `${style} system-ui, sans-serif`;
  context.scale(ratio, ratio);
  context.fillStyle = ink("raised");
  context.fillRect(0, 0, box.width + side, box.height + top);
  context.drawImage(canvas, 0, top, box.width, box.height);
  context.fillStyle = ink("ink");
  context.font = font("600 16px");
  context.fillText(`${state.cohort.title}: ${byId("count").textContent}`, 16, 28);
  context.font = font("12px");
  context.fillStyle = ink("muted");
  context.fillText(byId("told").textContent, 12, box.height + top - 10, box.width - 24);
  context.font = font("600 13px");
  context.fillStyle = ink("ink");
  context.fillText(byId("colour").value, box.width, top + 20, side - 16);
  context.font = font("13px");
  let y = top + 44;
  for (const button of byId("legend").querySelectorAll("button")) {
    const [sample, name, count] = button.children;
    context.drawImage(sample, box.width, y - 12, 14, 14);
    context.fillText(`${name.textContent}  ${count.textContent}`, box.width + 22, y, side - 40);
    y += 22;
  }
  const ramp = byId("legend").querySelector(".ramp");
  if (ramp) {
    context.drawImage(ramp, box.width, y - 14, side - 30, 10);
    context.fillText([...byId("legend").querySelectorAll(".ends span")].map((end) => end.textContent).join(" to "), box.width, y + 14, side - 30);
  }
  sheet.toBlob((blob) => saved(blob, `${state.cohort.title}-map.png`));
}
