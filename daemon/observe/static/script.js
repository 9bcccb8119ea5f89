// Keeps the page up to date: fetches it again and puts in the parts that changed. Says so when lensd is silent.
"use strict";

// Behind a proxy the page may have been asked for without a slash at the end: relative addresses would lead astray.
if (!location.pathname.endsWith("/")) location.replace(location.pathname + "/" + location.search + location.hash);

const EVERY_MS = 2000;
const PATIENCE_MS = 4000; // before an answer that does not come counts as silence

const PAGE = location.href.replace(/#.*/, ""); // whatever prefix a proxy gave it

const silence = document.getElementById("silence");
let answeredAt = new Date();
let timer = null;

async function refresh() {
  clearTimeout(timer);
  try {
    const response = await fetch(PAGE, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!response.ok) throw new Error(`answered ${response.status}`);
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!fresh.documentElement.dataset.instance) throw new Error("answered for another page"); // a proxy's own
    show(fresh);
    heard();
  } catch {
    missed();
  }
  timer = setTimeout(refresh, EVERY_MS);
}

function show(fresh) {
  const here = document.documentElement;
  const there = fresh.documentElement;
  if (here.dataset.revision !== there.dataset.revision || parts(document) !== parts(fresh)) {
    location.reload(); // another version: its style and script belong to it; or one with other parts
    return;
  }
  here.dataset.instance = there.dataset.instance;
  if (document.title !== fresh.title) document.title = fresh.title;
  const icon = document.querySelector("link[rel=icon]");
  const freshIcon = fresh.querySelector("link[rel=icon]").getAttribute("href");
  if (icon.getAttribute("href") !== freshIcon) icon.setAttribute("href", freshIcon);
  for (const part of fresh.querySelectorAll("[data-live]")) {
    const old = document.getElementById(part.id);
    if (old.className !== part.className) old.className = part.className;
    update(old, part);
  }
}

function parts(page) {
  return Array.from(page.querySelectorAll("[data-live]"), (part) => part.id).join();
}

// Children that are as they were stay in place, so that focus and selection do.
function update(old, part) {
  const before = Array.from(old.children);
  const after = Array.from(part.children);
  if (!before.length || before.length !== after.length) {
    if (old.innerHTML !== part.innerHTML) old.replaceChildren(...part.childNodes);
    return;
  }
  for (const [i, child] of before.entries()) {
    if (!child.isEqualNode(after[i])) child.replaceWith(after[i]);
  }
}

function heard() {
  answeredAt = new Date();
  if (silence.hidden) return;
  silence.hidden = true;
  silence.textContent = "";
  document.body.classList.remove("is-silent");
}

function missed() {
  if (!silence.hidden) return;
  silence.textContent =
    `lensd does not answer. What is shown is from ${answeredAt.toLocaleTimeString()}; this page keeps trying.`;
  silence.hidden = false;
  document.body.classList.add("is-silent");
  document.title = "no answer · lensd";
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
timer = setTimeout(refresh, EVERY_MS);
