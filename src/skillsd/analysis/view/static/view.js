// Keys, and pages that follow a run. Everything works without it, but for these two.
"use strict";

const editing = (e) => /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName) && e.target.type !== "radio";

function move(step) {
  const rows = [...document.querySelectorAll("[data-row]")];
  const at = rows.indexOf(document.activeElement);
  rows[at < 0 ? 0 : Math.min(rows.length - 1, Math.max(0, at + step))]?.focus();
}

function help() {
  const dialog = document.getElementById("help");
  const keys = [...document.querySelectorAll("[data-key]")].map((e) => [e.dataset.key, e.dataset.says]);
  keys.push(["j, k", "next, previous row; Enter opens it"], ["?", "these keys"]);
  dialog.querySelector("table").replaceChildren(
    ...keys.map((pair) => {
      const row = document.createElement("tr");
      pair.forEach((text) => row.insertCell().append(text));
      return row;
    }),
  );
  dialog.showModal();
}

document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (editing(e)) return e.key === "Escape" && e.target.blur();
  if (document.getElementById("help").open) return;
  if (e.key === "j" || e.key === "k") return move(e.key === "j" ? 1 : -1);
  if (e.key === "?") return help();
  const found = [...document.querySelectorAll("[data-key]")].find((x) => x.dataset.key === e.key);
  if (!found) return;
  e.preventDefault();
  found.tagName === "INPUT" ? found.focus() : found.click();
});

async function follow() {
  const { stamp, stampUrl } = document.body.dataset;
  const now = document.hidden ? stamp : await (await fetch(stampUrl)).text();
  if (now === stamp) return;
  const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
  const active = document.activeElement;
  const main = document.querySelector("main");
  const begun = (e) => e.value !== (e.defaultValue ?? e.value) || e.checked !== e.defaultChecked;
  if ([...main.querySelectorAll("input")].some(begun) || (main.contains(active) && editing({ target: active }))) return; // somebody chooses
  const open = [...main.querySelectorAll("details")].map((e) => e.open);
  const row = [...document.querySelectorAll("[data-row]")].indexOf(active);
  main.replaceWith(page.querySelector("main"));
  document.querySelectorAll("main details").forEach((e, i) => (e.open = open[i] ?? false));
  document.querySelectorAll("[data-row]")[row]?.focus();
  document.body.dataset.stamp = page.body.dataset.stamp;
}

if (document.body.dataset.stamp !== undefined) {
  const again = () => follow().catch(() => {}).finally(() => setTimeout(again, 2000)); // the server may be gone
  setTimeout(again, 2000);
}
