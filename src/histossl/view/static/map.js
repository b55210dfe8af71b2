// The map of the slides: a shade where there are thousands, points, and pictures of the slides when zoomed.
import { byId, element, ink, mark, once, ramp, rgb, sharp } from "./common.js";
import { state } from "./state.js";

const DENSE = 2500, CELL = 7; // points on the screen above which a shade is drawn; its cells in pixels
const CLOSE = 2, FEW = 500; // zoom from which, and points up to which pictures are drawn
const STILL = 150, ASKED = 6, KEPT = 500; // ms without movement before pictures are asked for; how many at once, and in memory
const STEPS = 32; // of a colour ramp

export const canvas = byId("points");
const card = byId("card");
const sprites = new Map(), pictures = new Map();
let lasso = null, asked = 0, still = 0, moved = 0;
const calls = { open() {}, chosen() {}, moved() {} };
export const on = (told) => Object.assign(calls, told);
export const draw = once(drawNow);

export function whole() {
  const known = state.places.filter(Boolean);
  if (!known.length) return;
  const box = canvas.getBoundingClientRect();
  const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  for (const place of known) for (const k of [0, 1]) { low[k] = Math.min(low[k], place[k]); high[k] = Math.max(high[k], place[k]); }
  const span = [high[0] - low[0], high[1] - low[1]];
  const scale = Math.min((box.width - 60) / (span[0] || 1), (box.height - 100) / (span[1] || 1));
  state.fit = scale;
  state.view = { scale, x: box.width / 2 - (low[0] + span[0] / 2) * scale, y: box.height / 2 - 8 - (low[1] + span[1] / 2) * scale };
  changed();
}

function changed() { calls.moved(); draw(); }

export function place(slide) {
  const { scale, x, y } = state.view;
  return [state.places[slide][0] * scale + x, state.places[slide][1] * scale + y];
}

// ---- drawing

export const looks = (slide) => (state.colours ? { kind: state.colours.kind?.[slide], share: state.colours.share?.[slide] } : { kind: 0 });

export function paint(context, x, y, radius, { kind, share }) {
  mark(context, x, y, radius, kind ?? null);
  const empty = kind === null || (share !== undefined && !Number.isFinite(share));
  if (!empty) {
    context.fillStyle = share === undefined ? ink(`k${kind ?? 0}`) : rgb(ramp(share));
    context.fill();
  }
  context.strokeStyle = empty ? ink("muted") : ink("raised");
  context.stroke();
}

// Each look is drawn once and then copied: ten times as fast.
function sprite(look, radius) {
  const ratio = devicePixelRatio || 1, share = look.share === undefined ? "" : Number.isFinite(look.share) ? Math.round(look.share * STEPS) : "none";
  const key = `${look.kind} ${share} ${radius} ${ratio}`;
  if (!sprites.has(key)) {
    const side = Math.ceil(2.6 * radius + 4), made = element("canvas", { width: side * ratio, height: side * ratio });
    const context = made.getContext("2d");
    context.scale(ratio, ratio);
    context.lineWidth = radius > 3 ? 1.2 : 0.5;
    paint(context, side / 2, side / 2, radius, Number.isFinite(look.share) ? { share: share / STEPS } : look);
    sprites.set(key, { made, side });
  }
  return sprites.get(key);
}

export function newColours() { sprites.clear(); draw(); }

function drawNow() {
  if (!state.cohort) return;
  const [context, width, height] = sharp(canvas), count = state.places.length;
  const chosen = new Uint8Array(count), { scale, x: left, y: top } = state.view, seen = [], unseen = [];
  for (const slide of state.order) chosen[slide] = 1;
  for (let slide = 0; slide < count; slide++) {
    const at = state.places[slide];
    if (!at) continue;
    const x = at[0] * scale + left, y = at[1] * scale + top;
    if (x > -40 && y > -40 && x < width + 40 && y < height + 40) (chosen[slide] ? seen : unseen).push([slide, x, y]);
  }
  const dense = seen.length > DENSE, all = seen.length + unseen.length, radius = all > 1500 ? 3 : all > 500 ? 4 : 6;
  for (const [slides, alpha] of [[unseen, 0.14], [seen, 0.92]]) {
    context.globalAlpha = alpha;
    if (slides.length > DENSE) shade(context, slides, width, height);
    else for (const [slide, x, y] of slides) stamp(context, sprite(looks(slide), radius), x, y);
  }
  context.globalAlpha = 1;
  const large = !dense && scale > CLOSE * state.fit && seen.length <= FEW ? thumbnails(context, seen, Math.min(72, width / 6)) : 0;
  for (const slide of state.picked) ring(context, slide, radius + 4, "accent");
  state.marked.forEach((slide, k) => ring(context, slide, radius + 4, "bad", k + 1));
  if (state.under !== null && state.places[state.under]) {
    if (!large) stamp(context, sprite(looks(state.under), radius * 1.5), ...place(state.under));
    ring(context, state.under, radius * 1.5 + 4, "ink");
  }
  lassoed(context);
  byId("told").textContent = state.told + (dense ? " The shade is how many slides lie there: zoom in for points." : "");
  Object.assign(canvas.dataset, { drawn: seen.length + unseen.length, dense: dense ? 1 : "", pictures: large });
}

function stamp(context, { made, side }, x, y) { context.drawImage(made, x - side / 2, y - side / 2, side, side); }

function ring(context, slide, radius, colour, number) {
  if (!state.places[slide]) return;
  const [x, y] = place(slide);
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.strokeStyle = ink(colour);
  context.lineWidth = 1.6;
  context.stroke();
  if (!number) return;
  context.font = "600 12px system-ui, sans-serif";
  context.lineWidth = 3;
  context.strokeStyle = ink("raised");
  context.strokeText(number, x + radius + 2, y - radius + 5);
  context.fillStyle = ink(colour);
  context.fillText(number, x + radius + 2, y - radius + 5);
}

// How many slides lie where, in the mean colour of those, on a coarse grid that is drawn smoothly.
function shade(context, slides, width, height) {
  const columns = Math.ceil(width / CELL) + 2, rows = Math.ceil(height / CELL) + 2, sums = new Float32Array(4 * columns * rows);
  const inks = new Map();
  for (const [slide, x, y] of slides) {
    const look = looks(slide), key = look.share === undefined ? look.kind : Math.round(look.share * STEPS) / STEPS;
    if (!inks.has(key)) inks.set(key, look.share === undefined ? channels(ink(look.kind === null || look.kind === undefined ? "muted" : `k${look.kind}`)) : Number.isFinite(key) ? ramp(key) : channels(ink("muted")));
    const [r, g, b] = inks.get(key), u = x / CELL + 0.5, v = y / CELL + 0.5, i = Math.floor(u), j = Math.floor(v);
    for (const [di, dj] of [[0, 0], [1, 0], [0, 1], [1, 1]]) {
      if (i + di < 0 || j + dj < 0 || i + di >= columns || j + dj >= rows) continue;
      const part = (di ? u - i : 1 - u + i) * (dj ? v - j : 1 - v + j), at = 4 * ((j + dj) * columns + i + di);
      sums[at] += part * r; sums[at + 1] += part * g; sums[at + 2] += part * b; sums[at + 3] += part;
    }
  }
  let most = 2;
  for (let at = 3; at < sums.length; at += 4) most = Math.max(most, sums[at]);
  const sheet = element("canvas", { width: columns, height: rows }), image = sheet.getContext("2d").createImageData(columns, rows);
  for (let at = 0; at < sums.length; at += 4) {
    const count = sums[at + 3];
    if (!count) continue;
    for (const k of [0, 1, 2]) image.data[at + k] = sums[at + k] / count;
    image.data[at + 3] = 255 * (count < 1 ? 0.15 * count : 0.15 + 0.85 * Math.log(count) / Math.log(most));
  }
  sheet.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(sheet, -CELL, -CELL, columns * CELL, rows * CELL);
}

function channels(colour) { return [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16)); }

// Pictures that do not overlap; the others stay points. The order is that of the slides, so that none flickers.
function thumbnails(context, seen, side) {
  const placed = [];
  for (const [slide, x, y] of seen) {
    if (placed.some(([, px, py]) => Math.abs(px - x) < side + 6 && Math.abs(py - y) < side + 6)) continue;
    if (!state.cohort.failed[slide]) placed.push([slide, x, y]);
  }
  let drawn = 0;
  for (const [slide, x, y] of placed) {
    const picture = pictures.get(slide);
    if (!picture?.complete || !picture.naturalWidth) continue;
    const part = side / Math.max(picture.naturalWidth, picture.naturalHeight), w = picture.naturalWidth * part, h = picture.naturalHeight * part;
    context.fillStyle = "#fff";
    context.fillRect(x - side / 2, y - side / 2, side, side);
    context.drawImage(picture, x - w / 2, y - h / 2, w, h);
    const look = looks(slide);
    context.strokeStyle = look.share !== undefined && Number.isFinite(look.share) ? rgb(ramp(look.share)) : look.kind === null ? ink("muted") : ink(`k${look.kind ?? 0}`);
    context.lineWidth = 3;
    context.strokeRect(x - side / 2, y - side / 2, side, side);
    stamp(context, sprite(look, 6), x - side / 2 + 2, y - side / 2 + 2);
    drawn++;
  }
  clearTimeout(still);
  still = setTimeout(() => ask(placed.map(([slide]) => slide)), STILL);
  return drawn;
}

function ask(slides) {
  for (const slide of slides) {
    if (asked >= ASKED) return;
    if (pictures.has(slide)) continue;
    const picture = new Image(), came = () => { asked--; draw(); }; // which asks for the next ones
    picture.onload = picture.onerror = came;
    asked++;
    picture.src = `slides/${slide}/thumbnail.jpg`;
    pictures.set(slide, picture);
    if (pictures.size > KEPT) pictures.delete(pictures.keys().next().value);
  }
}

function lassoed(context) {
  const path = lasso ?? state.ring?.map(([x, y]) => [x * state.view.scale + state.view.x, y * state.view.scale + state.view.y]);
  if (!path) return;
  context.beginPath();
  path.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
  context.fillStyle = ink("accent");
  context.globalAlpha = lasso ? 0.12 : 0.05;
  context.fill();
  context.globalAlpha = 1;
  context.strokeStyle = ink("accent");
  context.lineWidth = 1.2;
  context.stroke();
}

// ---- pointing

function nearest(x, y, within) {
  let best = null, least = within * within;
  const { scale, x: left, y: top } = state.view;
  for (const slide of state.order) {
    const at = state.places[slide], dx = at[0] * scale + left - x, dy = at[1] * scale + top - y, distance = dx * dx + dy * dy;
    if (distance < least) { best = slide; least = distance; }
  }
  return best;
}

export function point(slide, spoken = false) {
  if (slide === state.under && !spoken) return;
  state.under = slide;
  canvas.dataset.under = slide ?? "";
  card.hidden = slide === null;
  if (slide !== null) {
    const [x, y] = place(slide), box = canvas.getBoundingClientRect(), column = byId("colour").value;
    const said = column ? `${column}: ${state.cohort.columns[column][slide] || "not known"}` : "";
    const picture = card.querySelector("img"), address = `slides/${slide}/thumbnail.jpg`;
    if (!picture.src.endsWith(address)) picture.src = address;
    card.querySelector("b").textContent = state.cohort.names[slide];
    card.querySelector("span").textContent = said;
    card.style.left = `${Math.max(4, Math.min(x + 16, box.width - 192))}px`;
    card.style.top = `${Math.max(4, y > box.height / 2 ? y - 206 : y + 16)}px`;
    if (spoken) byId("spoken").textContent = `${state.cohort.names[slide]}. ${said}${state.picked.has(slide) ? ". Picked" : ""}`;
  }
  draw();
}

export function zoom(factor, x, y) {
  const scale = Math.min(Math.max(state.view.scale * factor, state.fit / 2), state.fit * 5000), by = scale / state.view.scale;
  state.view = { scale, x: x - (x - state.view.x) * by, y: y - (y - state.view.y) * by };
  changed();
}

function pick(slide) {
  if (!state.picked.delete(slide)) state.picked.add(slide);
  byId("spoken").textContent = `${state.cohort.names[slide]} ${state.picked.has(slide) ? "picked" : "no longer picked"}, ${state.picked.size} in all`;
  calls.chosen();
}

// The nearest slide within 45 degrees of a direction.
function beside(from, [dx, dy]) {
  const [x, y] = place(from);
  let best = null, least = Infinity;
  for (const slide of state.order) {
    const [px, py] = place(slide), along = (px - x) * dx + (py - y) * dy, across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    if (slide !== from && along > 0 && across <= along && along + across < least) { best = slide; least = along + across; }
  }
  return best;
}

export function within(ring) {
  return new Set(state.places.flatMap((at, slide) => (at && inside(at, ring) ? [slide] : [])));
}

function inside([x, y], ring) {
  let odd = false;
  for (let k = 0, j = ring.length - 1; k < ring.length; j = k++) {
    const [ax, ay] = ring[k], [bx, by] = ring[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
  }
  return odd;
}

export function setLasso(wanted) {
  byId("lasso").setAttribute("aria-pressed", String(wanted));
  canvas.classList.toggle("lasso", wanted);
}

const spot = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
const pressed = () => byId("lasso").getAttribute("aria-pressed") === "true";
const fingers = new Map();

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, spot(event));
  moved = 0;
  if (fingers.size === 1 && (pressed() || event.shiftKey)) lasso = [spot(event)];
});
canvas.addEventListener("pointermove", (event) => {
  const now = spot(event), before = fingers.get(event.pointerId);
  if (!before) { point(nearest(...now, 14)); return; }
  moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
  if (lasso) { if (Math.hypot(now[0] - lasso.at(-1)[0], now[1] - lasso.at(-1)[1]) > 3) lasso.push(now); }
  else if (fingers.size === 1) { state.view.x += now[0] - before[0]; state.view.y += now[1] - before[1]; calls.moved(); }
  else {
    const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    const was = Math.hypot(before[0] - other[0], before[1] - other[1]), is = Math.hypot(now[0] - other[0], now[1] - other[1]);
    if (was > 0) zoom(is / was, other[0], other[1]);
  }
  fingers.set(event.pointerId, now);
  draw();
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
  if (!fingers.delete(event.pointerId)) return;
  if (lasso) {
    const { scale, x, y } = state.view, path = lasso.map(([px, py]) => [(px - x) / scale, (py - y) / scale]);
    lasso = null;
    if (path.length > 3) { state.ring = path; state.inRing = within(path); setLasso(false); calls.chosen(); }
    draw();
  } else if (moved < 6 && name === "pointerup") {
    const slide = nearest(...spot(event), event.pointerType === "touch" ? 24 : 14);
    if (slide !== null && (event.ctrlKey || event.metaKey)) pick(slide);
    // A touch screen has no hover: the first touch shows the slide, the second opens it.
    else if (slide !== null && (event.pointerType !== "touch" || slide === state.under)) calls.open(slide);
    else point(slide);
  }
});
canvas.addEventListener("pointerleave", () => { if (!fingers.size && document.activeElement !== canvas) point(null); });
canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(1.0015 ** -event.deltaY, ...spot(event)); }, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const box = canvas.getBoundingClientRect(), { under } = state;
  if (step) {
    if (under === null) point(nearest(box.width / 2, box.height / 2, Infinity), true);
    else point(beside(under, step) ?? under, true);
  } else if (event.key === "Enter" && under !== null) calls.open(under);
  else if (event.key === " " && under !== null) pick(under);
  else if (event.key === "+" || event.key === "=") zoom(1.3, box.width / 2, box.height / 2);
  else if (event.key === "-") zoom(1 / 1.3, box.width / 2, box.height / 2);
  else if (event.key === "Escape") point(null);
  else return;
  event.preventDefault();
});
