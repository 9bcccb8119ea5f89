// Sorts and searches the tables, switches light and dark, and opens what a link or the printer asks for.
"use strict";

const root = document.documentElement;

// Light and dark: the reader's system decides until the button is pressed.
const theme = document.getElementById("theme");
const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : darkSystem.matches;
}

function nameTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
}

theme.hidden = false;
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
darkSystem.addEventListener("change", nameTheme);
nameTheme();

// Sorting: a number first falls, a text first rises; what has no number stays at the end.
function keyOf(row, place) {
  const cell = row.cells[place];
  return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
}

function textOf(row, place) {
  return row.cells[place].textContent.trim();
}

function sort(table, header) {
  const place = header.cellIndex;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const numeric = rows.some((row) => row.cells[place].dataset.v !== undefined) || header.classList.contains("number");
  const first = numeric && header.classList.contains("number") ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = header.getAttribute("aria-sort") === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  const keyed = rows.map((row) => [numeric ? keyOf(row, place) : textOf(row, place), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (numeric ? a - b : a.localeCompare(b));
  });
  body.append(...keyed.map(([, row]) => row));
  for (const one of header.parentElement.cells) one.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
}

for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length < 2) continue;
  for (const header of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...Array.from(header.childNodes).filter((node) => node.nodeName !== "SMALL"));
    header.prepend(button);
    button.addEventListener("click", () => sort(table, header));
  }
}

// Searching: a row stays where it has every word.
const search = document.getElementById("search");
if (search) {
  const rows = Array.from(document.querySelectorAll("#ranked tbody tr"));
  const matches = document.getElementById("matches");
  const texts = rows.map((row) => row.dataset.find.toLowerCase());
  search.closest(".search").hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, place) => {
      row.hidden = !words.every((word) => texts[place].includes(word));
      if (!row.hidden) shown += 1;
    });
    matches.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
}

// A link to a closed card opens it.
function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.nodeName === "DETAILS" && !target.open) {
    target.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTarget);
openTarget();

// On paper the first features are open; what else is, the reader opened.
let closed = [];
addEventListener("beforeprint", () => {
  closed = Array.from(document.querySelectorAll("details[data-printed]:not([open])"));
  for (const one of closed) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of closed) one.open = false;
  closed = [];
});
