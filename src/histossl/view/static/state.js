// What the page of all slides shows; its modules read and change it, and call `choose` or `draw` of the others.
export const state = {
  cohort: null,
  places: [], // of each slide on the map, [x, y], or null
  told: "", // about the map
  colours: null, // kind or share of each slide; null is one colour
  onlyClass: null,
  shown: [], order: [], // slides that pass the filters; those of them that are on the map
  view: { scale: 1, x: 0, y: 0 },
  fit: 1, // the scale at which the whole map is on the screen
  under: null, // the slide that the mouse or the keyboard points at
  ring: null, inRing: null, // a lasso in coordinates of the map, and the slides in it
  picked: new Set(), // slides chosen one by one
  marked: [], // slides to label next
};
