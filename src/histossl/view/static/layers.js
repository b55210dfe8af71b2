// Overlays of a slide. A layer draws into a context whose unit is a level-0 pixel; `seen` is the visible region.
import { fetched } from "./common.js";

const GRID = 9; // smallest tile in screen pixels whose frame is drawn
const FINE = 5; // smallest nucleus (8 µm) in screen pixels whose outline is drawn
const CELLS = 400; // of nuclei that are kept in memory
const ROOM = 0.25; // of the screen on each side, margin for which outlines are drawn in advance
const SETTLED = 120; // milliseconds without a change of scale, after which zooming has ended

class Outlines {
  async load(base) {
    const rings = await fetched(`${base}/${this.constructor.file}`);
    this.path = new Path2D();
    for (const ring of rings) { ring.forEach(([x, y], k) => (k ? this.path.lineTo(x, y) : this.path.moveTo(x, y))); this.path.closePath(); }
    return this.constructor.said(rings.length);
  }
  draw(context, seen, strength) {
    context.strokeStyle = this.constructor.colour;
    context.globalAlpha = 0.3 + 0.7 * strength;
    context.lineWidth = this.constructor.width / seen.scale;
    context.setLineDash(this.constructor.dashes.map((length) => length / seen.scale));
    context.stroke(this.path);
    return 1;
  }
}

export class Tissue extends Outlines {
  static colour = "#b8420b";
  static file = "tissue.json";
  static width = 2.2;
  static dashes = [];
  static said(count) { return count === 1 ? "One piece of tissue." : `${count} outlines of tissue and holes.`; }
}

// Dashed, so that where the tissue ends at an area both are seen.
export class Areas extends Outlines {
  static colour = "#006d77";
  static file = "areas.json";
  static width = 3;
  static dashes = [9, 6];
  static said(count) { return count === 1 ? "One area." : `${count} outlines of areas and holes.`; }
}

// Stride and extent, one corner per tile and, for heatmaps, one share per tile.
function places(data, shared) {
  const [stride, extent] = new Float32Array(data, 0, 2), count = (data.byteLength - 8) / (shared ? 12 : 8);
  return { stride, extent, xy: new Int32Array(data, 8, 2 * count), shares: shared && new Float32Array(data, 8 + 8 * count, count) };
}

// One pixel per tile, so that a single picture is drawn for any number of tiles.
function sheet({ stride, xy }, colour) {
  const column = (k) => Math.round(xy[2 * k] / stride), row = (k) => Math.round(xy[2 * k + 1] / stride), count = xy.length / 2;
  let width = 1, height = 1;
  for (let k = 0; k < count; k++) { width = Math.max(width, column(k) + 1); height = Math.max(height, row(k) + 1); }
  const canvas = Object.assign(document.createElement("canvas"), { width, height }), context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let k = 0; k < count; k++) image.data.set(colour(k), 4 * (row(k) * width + column(k)));
  context.putImageData(image, 0, 0);
  return canvas;
}

function spread(context, canvas, stride, smooth) {
  context.imageSmoothingEnabled = smooth;
  context.drawImage(canvas, 0, 0, canvas.width * stride, canvas.height * stride);
}

export class Tiles {
  static colour = "#143cc8";
  async load(base) {
    this.tiles = places(await fetched(`${base}/tiles.bin`, "arrayBuffer"), false);
    this.sheet = sheet(this.tiles, () => [20, 60, 200, 255]);
    return `${(this.tiles.xy.length / 2).toLocaleString("en")} tiles.`;
  }
  draw(context, seen, strength) {
    const { stride, extent, xy } = this.tiles;
    if (extent * seen.scale < GRID) {
      context.globalAlpha = 0.45 * strength;
      spread(context, this.sheet, stride, false);
      return xy.length / 2;
    }
    context.globalAlpha = strength;
    context.strokeStyle = Tiles.colour;
    context.lineWidth = 1.2 / seen.scale;
    context.beginPath();
    let drawn = 0;
    for (let k = 0; k < xy.length; k += 2) {
      if (xy[k] > seen.right || xy[k + 1] > seen.bottom || xy[k] + extent < seen.left || xy[k + 1] + extent < seen.top) continue;
      context.rect(xy[k], xy[k + 1], extent, extent);
      drawn++;
    }
    context.stroke();
    return drawn;
  }
}

// Orange speaks for the class, blue against it: distinguishable with red-green colour blindness.
const FOR = [224, 110, 10], AGAINST = [30, 100, 200];

export class Heat {
  constructor(number) { this.number = number; }
  async load(base) {
    this.tiles = places(await fetched(`${base}/heat/${this.number}.bin`, "arrayBuffer"), true);
    const { shares } = this.tiles, sizes = Float32Array.from(shares, Math.abs).sort();
    const most = sizes[Math.floor((sizes.length - 1) * 0.98)] || 1;
    this.sheet = sheet(this.tiles, (k) => [...(shares[k] > 0 ? FOR : AGAINST), 255 * Math.min(1, Math.abs(shares[k]) / most)]);
    return "Orange tiles speak for the class, blue ones against it.";
  }
  draw(context, seen, strength) {
    context.globalAlpha = 0.9 * strength;
    spread(context, this.sheet, this.tiles.stride, false);
    return this.tiles.xy.length / 2;
  }
}

const alike = (a, b) => Math.abs(a / b - 1) < 1e-6;

// Outlines are drawn on a sheet, somewhat larger than the screen, which is drawn over the slide: moving it is cheap.
export class Nuclei {
  static colour = "#00a050";
  constructor(changed) { this.changed = changed; this.cells = new Map(); this.asked = new Map(); }
  async load(base) {
    this.base = base;
    this.about = await fetched(`${base}/nuclei.json`);
    this.picture = await createImageBitmap(await fetched(`${base}/nuclei.png`, "blob"));
    return `${this.about.count.toLocaleString("en")} nuclei${this.about.count ? "; closer, their outlines are shown." : "."}`;
  }
  draw(context, seen, strength) {
    context.globalAlpha = strength;
    context.imageSmoothingEnabled = true;
    if ((8 / (seen.mpp || 0.5)) * seen.scale < FINE) {
      this.drop(new Set());
      this.sheet = null;
      context.drawImage(this.picture, 0, 0, seen.width, seen.height);
      return 0;
    }
    const wanted = this.within(seen, this.about.side); // also those beyond the edge, which may be needed next
    this.drop(wanted);
    for (const cell of wanted) if (!this.cells.has(cell)) this.ask(cell);
    for (const cell of this.cells.keys()) {
      if (this.cells.size <= CELLS) break;
      if (!wanted.has(cell)) this.cells.delete(cell);
    }
    if (this.zooming(seen)) setTimeout(this.changed, SETTLED);
    else if (!this.holds(seen)) this.fill(seen, context.getTransform().a);
    const { canvas, left, top, right, bottom } = this.sheet, { a, e, f } = context.getTransform();
    if (alike(seen.scale, this.sheet.scale)) {
      context.setTransform(1, 0, 0, 1, 0, 0); // aligned to whole pixels the sheet stays sharp
      context.drawImage(canvas, Math.round(left * a + e), Math.round(top * a + f));
    } else context.drawImage(canvas, left, top, right - left, bottom - top);
    return this.sheet.drawn;
  }
  // While the scale changes from frame to frame, the old sheet is shown, somewhat blurred.
  zooming({ scale }) {
    const now = performance.now();
    if (!alike(scale, this.scale)) { this.scale = scale; this.since = now; }
    return this.sheet && !alike(scale, this.sheet.scale) && now - this.since < SETTLED;
  }
  holds({ scale, left, top, right, bottom, width, height }) {
    const sheet = this.sheet;
    return sheet && alike(scale, sheet.scale) && Math.max(left, 0) >= sheet.left && Math.max(top, 0) >= sheet.top
      && Math.min(right, width) <= sheet.right && Math.min(bottom, height) <= sheet.bottom;
  }
  // The numbers of the cells that intersect the visible region, with a margin in level-0 pixels.
  within({ left, top, right, bottom }, margin) {
    const { side, columns, cells } = this.about, found = new Set();
    for (let row = Math.max(0, Math.floor((top - margin) / side)); row <= Math.floor((bottom + margin) / side); row++) {
      for (let column = Math.max(0, Math.floor((left - margin) / side)); column <= Math.min(columns - 1, Math.floor((right + margin) / side)); column++) {
        if (cells[row * columns + column]) found.add(row * columns + column);
      }
    }
    return found;
  }
  // `dense`: pixels of the sheet per level-0 pixel.
  fill({ scale, left, top, right, bottom }, dense) {
    const across = (right - left) * ROOM, down = (bottom - top) * ROOM;
    const canvas = this.sheet?.canvas ?? document.createElement("canvas"), context = canvas.getContext("2d");
    canvas.width = Math.ceil((right - left + 2 * across) * dense);
    canvas.height = Math.ceil((bottom - top + 2 * down) * dense);
    this.sheet = { canvas, context, scale, drawn: 0, left: left - across, top: top - down };
    this.sheet.right = this.sheet.left + canvas.width / dense;
    this.sheet.bottom = this.sheet.top + canvas.height / dense;
    context.setTransform(dense, 0, 0, dense, -this.sheet.left * dense, -this.sheet.top * dense);
    context.strokeStyle = Nuclei.colour;
    context.lineWidth = Math.min(2, 0.8 + scale) / scale;
    for (const cell of this.within(this.sheet, this.about.reach)) if (this.cells.has(cell)) this.add(cell);
  }
  add(cell) {
    const path = this.cells.get(cell);
    this.cells.delete(cell);
    this.cells.set(cell, path); // the most recently used are last
    this.sheet.context.stroke(path);
    this.sheet.drawn += this.about.cells[cell];
  }
  // Cancel requests for cells that left the screen.
  drop(wanted) {
    for (const [cell, stop] of this.asked) if (!wanted.has(cell)) { stop.abort(); this.asked.delete(cell); }
  }
  async ask(cell) {
    if (this.asked.has(cell)) return;
    const stop = new AbortController();
    this.asked.set(cell, stop);
    try {
      this.cells.set(cell, this.path(cell, await fetched(`${this.base}/nuclei/${cell}.bin`, "arrayBuffer", stop.signal)));
      this.asked.delete(cell);
      if (this.sheet) this.add(cell);
      this.changed();
    } catch (error) {
      if (error.name !== "AbortError") console.warn(error.message); // and the cell is not requested again
    }
  }
  path(cell, data) {
    const { side, columns } = this.about, left = (cell % columns) * side, top = Math.floor(cell / columns) * side;
    const count = new Uint32Array(data, 0, 1)[0], sizes = new Uint16Array(data, 4, count);
    const steps = new Int16Array(data, 4 + 2 * count), path = new Path2D();
    let at = 0;
    for (const size of sizes) {
      for (let k = 0; k < size; k++, at += 2) {
        const x = left + steps[at] / 4, y = top + steps[at + 1] / 4;
        if (k) path.lineTo(x, y); else path.moveTo(x, y);
      }
      path.closePath();
    }
    return path;
  }
}
