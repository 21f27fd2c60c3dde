"use strict";
// Tables: a heading's button sorts by its column, numbers from high to low first.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const text = (row) => row.cells[column].textContent.trim().replace("−", "-");
    const number = (row) => { const value = parseFloat(text(row)); return Number.isNaN(value) ? -Infinity : value; };
    const isText = column === 0;
    const before = heading.getAttribute("aria-sort");
    const order = before ? (before === "ascending" ? -1 : 1) : (isText ? 1 : -1);
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
    const compare = isText ? (a, b) => text(a).localeCompare(text(b)) : (a, b) => number(a) - number(b);
    body.append(...[...body.rows].sort((a, b) => order * compare(a, b)));
  }));
}
// Mistakes: show those of the chosen kind and class, a page at a time.
const kind = document.getElementById("kind");
if (kind) {
  const PAGE = 24;
  const ofClass = document.getElementById("class");
  const more = document.getElementById("more");
  const figures = [...document.querySelectorAll(".gallery figure")];
  let limit = PAGE;
  const show = () => {
    const chosen = figures.filter((figure) => (!kind.value || figure.dataset.kind === kind.value)
      && (!ofClass.value || figure.dataset.class === ofClass.value));
    const shown = new Set(chosen.slice(0, limit));
    figures.forEach((figure) => { figure.hidden = !shown.has(figure); });
    more.hidden = shown.size === chosen.length;
    document.getElementById("shown").textContent = `${shown.size} of ${chosen.length} shown`;
  };
  const restart = () => { limit = PAGE; show(); };
  kind.addEventListener("change", restart);
  ofClass.addEventListener("change", restart);
  more.addEventListener("click", () => { limit += PAGE; show(); });
  show();  // the browser may remember a choice
}
