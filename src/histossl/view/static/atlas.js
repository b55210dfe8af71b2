// The map of the slides, and the list of the selected ones: by text, by class, by a lasso.
import { CLASSES, byId, dark, element, fetched, ink, listed, mark, once, ramp, rgb, sharp } from "./common.js";

const LISTED = 200, SAID = 60;
const canvas = byId("points"), card = byId("card");
let cohort, places = [], order = [], colours = null, columns;
let view = { scale: 1, x: 0, y: 0 }, under = null, lasso = null, inLasso = null, onlyClass = null, shown = [];

const text = (slide) => columns.map((values) => values[slide]).join(" ").toLowerCase();
const draw = once(drawNow);

async function start() {
  cohort = await fetched("cohort.json");
  document.title = `${cohort.title} – histossl`;
  byId("title").textContent = cohort.title;
  columns = [cohort.names, ...Object.values(cohort.columns)];
  byId("colour").append(element("option", { value: "" }, "one colour"),
    ...Object.keys(cohort.columns).map((name) => element("option", { value: name }, name)));
  byId("colour").value = Object.keys(cohort.columns).find((name) => classes(name).length > 1) ?? "";
  byId("map").append(...Object.entries(cohort.maps).map(([name, said]) => element("option", { value: name }, said)));
  recolour();
  await remap();
  document.documentElement.dataset.ready = "atlas";
}

async function remap() {
  const name = byId("map").value;
  if (!name) {
    document.body.classList.add("unmapped");
  } else {
    byId("told").textContent = "…";
    const found = await fetched(`maps/${name}.json`);
    if (byId("map").value !== name) return;
    places = found.places;
    byId("told").textContent = found.told;
  }
  inLasso = null;
  whole();
  choose();
}

function classes(name) {
  const counts = new Map();
  for (const value of cohort.columns[name]) if (value) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
}

// How a column colours the map: one colour per class, or a colour ramp for numbers.
function recolour() {
  const name = byId("colour").value, legend = byId("legend");
  legend.replaceChildren();
  onlyClass = null;
  byId("legend-title").textContent = name;
  byId("legend-title").hidden = !name;
  if (!name) colours = null;
  else {
    const values = cohort.columns[name], ranked = classes(name);
    const numbers = values.map((value) => (value === "" ? NaN : Number(value)));
    const known = numbers.filter(Number.isFinite);
    if (ranked.length > CLASSES && known.length === values.filter(Boolean).length) {
      const low = Math.min(...known), high = Math.max(...known);
      colours = { share: numbers.map((value) => (value - low) / (high - low || 1)) };
      const strip = element("canvas", { class: "ramp", width: 256, height: 1, "aria-hidden": "true" }), context = strip.getContext("2d");
      for (let k = 0; k < 256; k++) { context.fillStyle = rgb(ramp(k / 255)); context.fillRect(k, 0, 1, 1); }
      legend.append(element("li", {}, strip, element("div", { class: "ends" }, element("span", {}, String(low)), element("span", {}, String(high)))));
    } else {
      const first = ranked.slice(0, CLASSES).map(([value]) => value).sort();
      const kinds = new Map(first.map((value, kind) => [value, kind]));
      colours = { kind: values.map((value) => (value === "" ? null : kinds.get(value) ?? CLASSES)) };
      const counts = new Map(ranked);
      const rows = first.map((value, kind) => [value, kind, counts.get(value)]);
      const others = ranked.slice(CLASSES).reduce((sum, [, count]) => sum + count, 0);
      if (others) rows.push([`${ranked.length - CLASSES} others`, CLASSES, others]);
      const none = values.filter((value) => value === "").length;
      if (none) rows.push(["not known", null, none]);
      for (const [label, kind, count] of rows) {
        const sample = element("canvas", { width: 28, height: 28, "aria-hidden": "true", style: null });
        sample.style.width = sample.style.height = "14px";
        const button = element("button", { type: "button", "aria-pressed": "false", onclick: () => {
          onlyClass = onlyClass?.kind === kind ? null : { kind };
          for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && onlyClass !== null));
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
  }
  choose();
}

function paint(context, x, y, radius, { kind, share }) {
  mark(context, x, y, radius, kind ?? null);
  const empty = kind === null || (share !== undefined && !Number.isFinite(share));
  if (!empty) {
    context.fillStyle = share === undefined ? ink(`k${kind ?? 0}`) : rgb(ramp(share));
    context.fill();
  }
  context.strokeStyle = empty ? ink("muted") : ink("raised");
  context.stroke();
}

function choose() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = [];
  for (let slide = 0; slide < cohort.names.length; slide++) {
    const said = words.length ? text(slide) : "";
    if (words.every((word) => said.includes(word)) && (!onlyClass || !colours?.kind || colours.kind[slide] === onlyClass.kind)
      && (!inLasso || inLasso.has(slide))) shown.push(slide);
  }
  order = shown.filter((slide) => places[slide]);
  const all = cohort.names.length, count = shown.length;
  byId("count").textContent = `${count === all ? "" : `${count} of `}${all} ${all === 1 ? "slide" : "slides"}`;
  byId("list-title").textContent = count === all ? "Slides" : `${count} chosen`;
  byId("clear").hidden = !inLasso;
  byId("more").textContent = count > LISTED ? `and ${count - LISTED} more: filter to see them` : "";
  const column = byId("colour").value;
  byId("list").replaceChildren(...shown.slice(0, LISTED).map((slide) => {
    const failed = cohort.failed[slide], value = column && cohort.columns[column][slide];
    const label = failed ?? (value ? `${column}: ${value}` : "");
    return listed(slide, cohort.names[slide], "", failed ? label.slice(0, SAID) : label, Boolean(failed));
  }));
  draw();
}

// ---- the map

function whole() {
  const known = places.filter(Boolean);
  if (!known.length) return;
  const box = canvas.getBoundingClientRect(), xs = known.map((p) => p[0]), ys = known.map((p) => p[1]);
  const low = [Math.min(...xs), Math.min(...ys)], span = [Math.max(...xs) - low[0], Math.max(...ys) - low[1]];
  const scale = Math.min((box.width - 60) / (span[0] || 1), (box.height - 100) / (span[1] || 1));
  view = { scale, x: box.width / 2 - (low[0] + span[0] / 2) * scale, y: box.height / 2 - 8 - (low[1] + span[1] / 2) * scale };
  draw();
}

const onScreen = (slide) => [places[slide][0] * view.scale + view.x, places[slide][1] * view.scale + view.y];

function drawNow() {
  const [context, width, height] = sharp(canvas);
  const many = places.length, radius = many > 5000 ? 2.5 : many > 800 ? 3.5 : 6;
  context.lineWidth = radius > 3 ? 1.2 : 0.5;
  const chosen = new Set(order);
  context.globalAlpha = 0.14;
  let drawn = 0;
  const one = (slide, size) => {
    const [x, y] = onScreen(slide);
    if (x < -9 || y < -9 || x > width + 9 || y > height + 9) return;
    drawn++;
    paint(context, x, y, size, colours ? { kind: colours.kind?.[slide], share: colours.share?.[slide] } : { kind: 0 });
  };
  places.forEach((place, slide) => { if (place && !chosen.has(slide)) one(slide, radius); });
  context.globalAlpha = 0.92;
  order.forEach((slide) => one(slide, radius));
  context.globalAlpha = 1;
  if (under !== null && places[under]) {
    one(under, radius * 1.5);
    const [x, y] = onScreen(under);
    context.beginPath();
    context.arc(x, y, radius * 1.5 + 4, 0, 2 * Math.PI);
    context.strokeStyle = ink("ink");
    context.lineWidth = 1.5;
    context.stroke();
  }
  if (lasso) {
    context.beginPath();
    lasso.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
    context.fillStyle = ink("accent");
    context.globalAlpha = 0.12;
    context.fill();
    context.globalAlpha = 1;
    context.strokeStyle = ink("accent");
    context.stroke();
  }
  canvas.dataset.drawn = drawn;
}

function nearest(x, y, within) {
  let best = null, least = within * within;
  for (const slide of order) {
    const [px, py] = onScreen(slide), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least) { best = slide; least = distance; }
  }
  return best;
}

function point(slide, spoken = false) {
  under = slide;
  canvas.dataset.under = slide ?? "";
  card.hidden = slide === null;
  if (slide !== null) {
    const [x, y] = onScreen(slide), box = canvas.getBoundingClientRect(), column = byId("colour").value;
    const said = column ? `${column}: ${cohort.columns[column][slide] || "not known"}` : "";
    const picture = card.querySelector("img"), address = `slides/${slide}/thumbnail.jpg`;
    if (!picture.src.endsWith(address)) picture.src = address;
    card.querySelector("b").textContent = cohort.names[slide];
    card.querySelector("span").textContent = said;
    card.style.left = `${Math.max(4, Math.min(x + 16, box.width - 192))}px`;
    card.style.top = `${Math.max(4, y > box.height / 2 ? y - 206 : y + 16)}px`;
    if (spoken) byId("spoken").textContent = `${cohort.names[slide]}. ${said}`;
  }
  draw();
}

function zoom(factor, x, y) {
  view = { scale: view.scale * factor, x: x - (x - view.x) * factor, y: y - (y - view.y) * factor };
  draw();
}

const open = (slide) => { location.href = `slides/${slide}`; };
const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
const pressed = () => byId("lasso").getAttribute("aria-pressed") === "true";
const fingers = new Map();
let moved = 0;

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, place(event));
  moved = 0;
  if (fingers.size === 1 && (pressed() || event.shiftKey)) lasso = [place(event)];
});
canvas.addEventListener("pointermove", (event) => {
  const now = place(event), before = fingers.get(event.pointerId);
  if (!before) { point(nearest(...now, 14)); return; }
  moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
  if (lasso) lasso.push(now);
  else if (fingers.size === 1) { view.x += now[0] - before[0]; view.y += now[1] - before[1]; }
  else {
    const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, spot]) => spot);
    const was = Math.hypot(before[0] - other[0], before[1] - other[1]), is = Math.hypot(now[0] - other[0], now[1] - other[1]);
    if (was > 0) zoom(is / was, other[0], other[1]);
  }
  fingers.set(event.pointerId, now);
  draw();
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
  if (!fingers.delete(event.pointerId)) return;
  if (lasso) {
    const ring = lasso;
    lasso = null;
    if (ring.length > 3) { inLasso = new Set(order.filter((slide) => inside(onScreen(slide), ring))); setLasso(false); choose(); }
    draw();
  } else if (moved < 6 && name === "pointerup") {
    const slide = nearest(...place(event), event.pointerType === "touch" ? 24 : 14);
    // A touch screen has no hover: the first touch shows the slide, the second opens it.
    if (slide !== null && (event.pointerType !== "touch" || slide === under)) open(slide);
    else point(slide);
  }
});
canvas.addEventListener("pointerleave", () => { if (!fingers.size && document.activeElement !== canvas) point(null); });
canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(1.0015 ** -event.deltaY, ...place(event)); }, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const box = canvas.getBoundingClientRect();
  if (step) {
    if (under === null) point(nearest(box.width / 2, box.height / 2, Infinity), true);
    else point(beside(under, step) ?? under, true);
  } else if (event.key === "Enter" && under !== null) open(under);
  else if (event.key === "+" || event.key === "=") zoom(1.3, box.width / 2, box.height / 2);
  else if (event.key === "-") zoom(1 / 1.3, box.width / 2, box.height / 2);
  else if (event.key === "Escape") point(null);
  else return;
  event.preventDefault();
});

// The nearest slide within 45 degrees of a direction.
function beside(from, [dx, dy]) {
  const [x, y] = onScreen(from);
  let best = null, least = Infinity;
  for (const slide of order) {
    const [px, py] = onScreen(slide), along = (px - x) * dx + (py - y) * dy, across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    if (slide !== from && along > 0 && across <= along && along + across < least) { best = slide; least = along + across; }
  }
  return best;
}

function inside([x, y], ring) {
  let odd = false;
  for (let k = 0, j = ring.length - 1; k < ring.length; j = k++) {
    const [ax, ay] = ring[k], [bx, by] = ring[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
  }
  return odd;
}

function setLasso(on) {
  byId("lasso").setAttribute("aria-pressed", String(on));
  canvas.classList.toggle("lasso", on);
}

// ---- the tools

byId("tools").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", choose);
byId("colour").addEventListener("change", recolour);
byId("map").addEventListener("change", () => remap().catch(trouble));
byId("lasso").addEventListener("click", () => setLasso(!pressed()));
byId("whole").addEventListener("click", whole);
byId("clear").addEventListener("click", () => { inLasso = null; choose(); });
byId("list").addEventListener("pointerover", (event) => {
  const slide = event.target.closest("a")?.dataset.slide;
  if (slide !== undefined && places[slide]) { under = Number(slide); draw(); }
});
byId("save").addEventListener("click", () => {
  const plain = (value) => (/^[=+@\t\r-]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value); // so that a spreadsheet does not read it as a formula
  const cell = (value) => (/[",\n\r]/.test(value) ? `"${plain(value).replaceAll('"', '""')}"` : plain(value));
  const names = Object.keys(cohort.columns);
  const rows = [["slide_id", ...names], ...shown.map((slide) => [cohort.names[slide], ...names.map((name) => cohort.columns[name][slide])])];
  const file = new Blob([rows.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" });
  const link = element("a", { href: URL.createObjectURL(file), download: "slides.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
function again() { for (const button of document.querySelectorAll("#legend button")) button.sample(); draw(); }
dark.addEventListener("change", again);
new ResizeObserver(() => { whole(); draw(); }).observe(canvas);

function trouble(error) { byId("count").textContent = error.message; byId("count").classList.add("bad"); }
start().catch(trouble);
