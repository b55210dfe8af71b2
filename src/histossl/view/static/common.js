// Shared by both pages: requests, elements, colours.

// With a body it is a POST of JSON.
export async function fetched(address, kind = "json", signal, body) {
  const answer = await fetch(address, body === undefined ? { signal } : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) {
    const text = await answer.text();
    let told = text;
    try { told = JSON.parse(text).error || text; } catch { /* plain text */ }
    throw new Error(told || `error ${answer.status}`);
  }
  return answer[kind]();
}

// Children are nodes or text; text is never parsed as HTML.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

export function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export const CLASSES = 8;
const SHAPES = 4;

// Classes also differ in shape, for people who cannot distinguish all colours.
export function mark(context, x, y, radius, kind) {
  context.beginPath();
  const shape = kind === null ? 0 : kind % SHAPES;
  if (shape === 0) context.arc(x, y, radius, 0, 2 * Math.PI);
  else if (shape === 1) context.rect(x - radius * 0.88, y - radius * 0.88, radius * 1.76, radius * 1.76);
  else {
    const [up, side, low] = shape === 2 ? [1.16, 1.08, 0.88] : [1.24, 1.24, 0];
    context.moveTo(x, y - radius * up);
    context.lineTo(x + radius * side, y + radius * low);
    if (shape === 3) context.lineTo(x, y + radius * up);
    context.lineTo(x - radius * side, y + radius * low);
    context.closePath();
  }
}

// Dark to light on a light page, light to dark on a dark one; readable without colour.
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [220, 205, 40]];
export function ramp(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), k = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[k].map((low, c) => Math.round(low + (RAMP[k + 1][c] - low) * (at - k)));
}

export const rgb = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

// A canvas as sharp as the screen; returns its context in CSS pixels.
export function sharp(canvas) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, box.width, box.height);
  return [context, box.width, box.height];
}

export function once(work) {
  let asked = 0;
  return () => { asked ||= requestAnimationFrame(() => { asked = 0; work(); }); };
}

export function listed(slide, name, base, small, bad, number) {
  return element("li", {}, element("a", { href: `${base}slides/${slide}`, "data-slide": slide },
    element("img", { src: `${base}slides/${slide}/thumbnail.jpg`, alt: "", loading: "lazy", onerror: (e) => { e.target.style.visibility = "hidden"; } }),
    element("b", {}, name, small ? element("small", { class: bad ? "bad" : null }, small) : null),
    number === undefined ? null : element("span", { class: "number" }, number)));
}

export function saved(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export const dark = matchMedia("(prefers-color-scheme: dark)");
