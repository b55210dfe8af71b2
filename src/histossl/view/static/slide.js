// One slide at all magnifications, its overlays, and the slides most similar to it.
import { Coming } from "./coming.js";
import { byId, element, fetched, listed, once, saved, sharp } from "./common.js";
import { Areas, Heat, Nuclei, Tiles, Tissue } from "./layers.js";

const slide = Number(location.pathname.split("/").pop());
const base = `${slide}`;
const canvas = element("canvas", { id: "overlay", "aria-hidden": "true" });
const LAYERS = { tissue: ["Tissue", Tissue], areas: ["Areas", Areas], tiles: ["Tiles", Tiles], heat: ["Heatmap of", Heat], nuclei: ["Nuclei", Nuclei] };
const ORDER = ["heat", "tiles", "nuclei", "tissue", "areas"];
const shown = new Map(), coming = new Coming(), wanted = new URLSearchParams(location.hash.slice(1));
let viewer, facts, due = 0;

const draw = once(drawNow);

async function start() {
  const words = await fetched(`${base}/words.json`);
  document.title = `${words.name} – histossl`;
  byId("title").textContent = words.name;
  byId("title").className = "";
  byId("previous").href = String(words.previous);
  byId("next").href = String(words.next);
  tell(words);
  try {
    facts = await fetched(`${base}/facts.json`);
  } catch (error) {
    document.body.classList.add("shut");
    trouble(error.message);
    return;
  }
  const list = byId("about");
  list.append(element("dt", {}, "Read as"), element("dd", {}, facts.vendor));
  if (!facts.mpp) list.append(element("dt", { class: "bad" }, "No mpp"), element("dd", {}, "lengths are in pixels"));
  open();
  offer();
}

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = false;
  document.documentElement.dataset.ready = "trouble";
}

function open() {
  // OpenSeadragon writes a style that hides the focus, unless it finds its own: this element passes for that.
  const theirs = document.createElementNS("urn:none", "style");
  theirs.setAttribute("data-openseadragon-mobile-css", "");
  document.head.append(theirs);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const last = Math.ceil(Math.log2(Math.max(facts.width, facts.height)));
  viewer = OpenSeadragon({
    element: byId("viewer"), showNavigationControl: false, prefixUrl: "", drawer: "canvas", animationTime: calm ? 0 : 0.6,
    showNavigator: innerWidth > 800, navigatorPosition: "TOP_RIGHT", navigatorHeight: 120, navigatorWidth: 150, navigatorAutoFade: false, navigatorOpacity: 1, navigatorBackground: "#fff", navigatorBorderColor: "#67636f", navigatorDisplayRegionColor: "#5f3d9c",
    loadTilesWithAjax: true, imageLoaderLimit: 0, timeout: 2 ** 31 - 1, maxImageCacheCount: 300, maxZoomPixelRatio: 6, visibilityRatio: 0.4, minZoomImageRatio: 0.7,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, zoomPerScroll: 1.25,
    tileSources: {
      width: facts.width, height: facts.height, tileSize: facts.side, tileOverlap: 0, minLevel: Math.min(last, Math.log2(facts.side)), maxLevel: last,
      ...coming.fetching(),
      getTileUrl: (level, column, row) => `${base}/tiles/${level}/${column}_${row}.jpg`,
    },
  });
  viewer.canvas.append(canvas); // below the elements that OpenSeadragon places over the slide
  new ResizeObserver(draw).observe(canvas);
  viewer.canvas.setAttribute("aria-label", "The slide: arrow keys move, plus and minus zoom, 0 shows all of it");
  viewer.addOnceHandler("tile-drawn", () => {
    document.documentElement.dataset.ready = "slide";
    document.documentElement.dataset.milliseconds = Math.round(performance.now());
  });
  viewer.addHandler("tile-load-failed", (event) => { document.documentElement.dataset.ready ??= "slide"; if (event.message && !/abort/i.test(event.message)) byId("said").textContent = "A part of the slide cannot be read: the file is damaged there."; });
  viewer.addHandler("update-viewport", () => coming.look(viewer));
  viewer.addOnceHandler("open", there);
  viewer.addHandler("animation-finish", remember);
  for (const name of ["update-viewport", "open", "resize"]) viewer.addHandler(name, draw);
  byId("in").onclick = () => viewer.viewport.zoomBy(1.6).applyConstraints();
  byId("out").onclick = () => viewer.viewport.zoomBy(1 / 1.6).applyConstraints();
  byId("home").onclick = () => viewer.viewport.goHome();
  byId("picture").onclick = picture;
  byId("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : byId("stage").requestFullscreen?.());
}

// ---- the address follows what is shown, and the picture of it

function there() {
  const [x, y, scale] = (wanted.get("at") ?? "").split(",").map(Number), port = viewer.viewport;
  if (![x, y, scale].every(Number.isFinite) || !(scale > 0)) return;
  port.zoomTo(port.imageToViewportZoom(scale), null, true);
  port.panTo(port.imageToViewportCoordinates(x, y), true);
  port.applyConstraints(true);
}

function remember() {
  clearTimeout(due);
  due = setTimeout(() => {
    const port = viewer.viewport, told = new URLSearchParams(), middle = port.viewportToImageCoordinates(port.getCenter());
    if (Math.abs(port.getZoom() / port.getHomeZoom() - 1) > 0.01) told.set("at", [Math.round(middle.x), Math.round(middle.y), port.viewportToImageZoom(port.getZoom()).toPrecision(4)].join(","));
    if (shown.size) told.set("show", [...shown.keys()].join(","));
    const heat = document.querySelector("#overlays select");
    if (shown.has("heat")) told.set("class", heat.selectedOptions[0].textContent);
    history.replaceState(null, "", `#${told}`);
  }, 250);
}

function picture() {
  const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1, bar = byId("scale").children[0].getBoundingClientRect().width;
  const sheet = element("canvas", { width: box.width * ratio, height: (box.height + 36) * ratio }), context = sheet.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, box.width, box.height + 36);
  context.drawImage(viewer.drawer.canvas, 0, 0, box.width, box.height);
  context.drawImage(canvas, 0, 0, box.width, box.height);
  context.fillStyle = "#1d1b24";
  context.fillRect(12, box.height + 24, bar, 3);
  context.font = "13px system-ui, sans-serif";
  context.fillText(byId("scale").children[1].textContent, 12, box.height + 18);
  context.fillText(byId("title").textContent, bar + 40, box.height + 22, box.width - bar - 52);
  sheet.toBlob((blob) => saved(blob, `${byId("title").textContent}.png`));
}

// ---- overlays

function offer() {
  for (const [name, [said, Layer]] of Object.entries(LAYERS)) {
    const there = facts.overlays[name];
    if (!there || there.length === 0) continue;
    const box = element("input", { type: "checkbox", id: `show-${name}` });
    const choice = name === "heat" ? element("select", { "aria-label": "Class that the heatmap explains" }, ...there.map((one, k) => element("option", { value: k }, one))) : null;
    const sample = element("i", {});
    sample.style.background = Layer.colour ?? "linear-gradient(90deg, rgb(30 100 200), #fff, rgb(224 110 10))";
    const make = () => (name === "heat" ? new Heat(choice.value) : new Layer(draw));
    box.addEventListener("change", () => toggle(name, box.checked, make));
    choice?.addEventListener("change", () => { box.checked = true; shown.delete(name); toggle(name, true, make); });
    byId("overlays").append(element("label", {}, box, sample, element("span", {}, said), choice));
    if (choice && there.includes(wanted.get("class"))) choice.value = there.indexOf(wanted.get("class"));
    if ((wanted.get("show") ?? "").split(",").includes(name)) box.click();
  }
  byId("strength").addEventListener("input", draw);
}

async function toggle(name, on, make) {
  if (!on) { shown.delete(name); byId("said").textContent = ""; remember(); draw(); return; }
  const layer = make();
  shown.set(name, { layer, ready: false });
  byId("said").textContent = "…";
  try {
    byId("said").textContent = await layer.load(base);
    if (shown.get(name)?.layer === layer) shown.get(name).ready = true;
    remember();
  } catch (error) {
    shown.delete(name);
    byId(`show-${name}`).checked = false;
    byId("said").textContent = error.message;
  }
  draw();
}

function drawNow() {
  if (!viewer?.isOpen()) return;
  const [context, width, height] = sharp(canvas), port = viewer.viewport;
  const at = (x, y) => port.imageToViewerElementCoordinates(new OpenSeadragon.Point(x, y));
  const corner = at(0, 0), scale = (at(facts.width, 0).x - corner.x) / facts.width;
  const seen = {
    scale, mpp: facts.mpp, width: facts.width, height: facts.height,
    left: -corner.x / scale, top: -corner.y / scale, right: (width - corner.x) / scale, bottom: (height - corner.y) / scale,
  };
  context.translate(corner.x, corner.y);
  context.scale(scale, scale);
  const strength = byId("strength").value / 100, drawn = {};
  for (const name of ORDER) {
    const one = shown.get(name);
    if (!one?.ready) continue;
    context.save();
    drawn[name] = one.layer.draw(context, seen, strength);
    context.restore();
  }
  canvas.dataset.drawn = JSON.stringify(drawn);
  measure(scale);
}

function measure(scale) {
  const unit = facts.mpp || 1, longest = 130 * unit / scale;
  const power = 10 ** Math.floor(Math.log10(longest)), length = [5, 2, 1].map((k) => k * power).find((k) => k <= longest);
  const [bar, text] = byId("scale").children;
  bar.style.width = `${(length / unit) * scale}px`;
  text.textContent = !facts.mpp ? `${length} px` : length >= 1000 ? `${length / 1000} mm` : `${+length.toPrecision(1)} µm`;
}

// ---- what the study knows

function tell(words) {
  const { predictions, neighbours, row, labels } = words;
  for (const target of new Set(predictions.map((one) => one.target))) {
    const rows = predictions.filter((one) => one.target === target);
    const classes = rows.some((one) => Object.keys(one.shares).length); // otherwise numbers, or ranks of a risk
    byId("predictions").append(element("table", {},
      element("caption", {}, `${target}: labelled ${rows[0].truth}`),
      element("thead", {}, element("tr", {}, element("th", {}, "by"), element("th", {}, "predicted"), element("th", {}, classes ? "its probability" : ""))),
      element("tbody", {}, ...rows.map((one, k) => {
        const share = one.shares[one.predicted], bar = element("span", { class: "bar" });
        bar.style.width = `${100 * (share ?? 0)}%`;
        return element("tr", { class: k ? null : "first" }, element("td", {}, one.embedding.replace("giga-ssl", "this method")),
          classes
            ? element("td", { class: one.predicted === one.truth ? null : "bad" }, one.predicted, one.predicted === one.truth ? "" : " ✗")
            : element("td", {}, `${+Number(one.predicted).toPrecision(3)}`),
          share === undefined ? element("td", {}) : element("td", {}, share.toFixed(2), bar));
      }))));
  }
  byId("predictions-box").hidden = !predictions.length;
  byId("neighbours").append(...neighbours.map((one) => listed(one.slide, one.name, "../", one.said, false, one.similarity.toFixed(2))));
  byId("neighbours-box").hidden = !neighbours.length;
  if (!row.patient_id) byId("alike").textContent = "By their vectors; they may be of the same patient: the patients are unknown.";
  const names = { patient_id: "patient", mpp: "µm per pixel" };
  const facts = [["file", words.file], ...Object.entries(row), ...Object.entries(labels)].filter(([name]) => name !== "slide_id");
  byId("about").append(...facts.flatMap(([name, value]) => [element("dt", { class: name === "error" ? "bad" : null }, names[name] ?? name), element("dd", {}, value)]));
}

start().catch((error) => trouble(error.message));
