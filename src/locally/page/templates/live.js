// Results as one types, and runs as they go. Without this file everything works by loading pages.
"use strict";

function debounce(wait, action) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, wait); };
}

function search() {
  const form = document.getElementById("find");
  if (!form) return;
  const list = document.getElementById("list");
  let latest = 0;
  const show = async () => {
    const query = new URLSearchParams(new FormData(form));
    const address = "/?" + query;
    const own = ++latest;
    const answer = await fetch(address, { headers: { "X-Part": "list" } });
    const text = await answer.text();
    if (own !== latest || !answer.ok) return;
    list.innerHTML = text; // our own templates, which escape what papers say
    history.replaceState(null, "", address);
  };
  form.addEventListener("input", debounce(120, show));
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
}

async function reload() {
  const answer = await fetch(location.pathname);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.getElementById("content").replaceWith(page.getElementById("content"));
  start();
}

function follow(section) {
  const source = new EventSource(`/requests/${section.dataset.request}/events`);
  const state = section.querySelector(".state");
  const bar = section.querySelector("progress");
  const log = section.querySelector(".log");
  source.onmessage = (message) => {
    const now = JSON.parse(message.data);
    if (!now.open) {
      source.close();
      reload();
      return;
    }
    const before = now.ahead ? `, ${now.ahead} before it` : "";
    const label = now.label ? `: ${now.label}` : "";
    state.textContent = `${now.state} at ${now.scale} scale${before}${label}`;
    bar.value = now.fraction;
    log.hidden = !now.log;
    log.textContent = now.log.trim().split("\n").slice(-12).join("\n");
  };
}

function forms(section) {
  const form = section.querySelector("form");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    form.querySelector("button").disabled = true;
    const answer = await fetch(form.action, {
      method: "POST", body: new URLSearchParams(new FormData(form)), headers: { Accept: "application/json" },
    });
    if (answer.ok) {
      reload();
      return;
    }
    const problem = document.createElement("p");
    problem.setAttribute("role", "alert");
    problem.textContent = (await answer.json()).error;
    form.after(problem);
  });
}

function shown(button, on) {
  const kind = button.value.replace("-", "");
  button.value = (on ? "-" : "") + kind;
  button.setAttribute("aria-pressed", String(on));
}

function marking() {
  document.addEventListener("submit", async (event) => {
    const form = event.target.closest("form[data-marks]"); // one for all papers: the button says which
    const button = event.submitter;
    if (!form || !button) return;
    event.preventDefault();
    const fields = new FormData(form);
    fields.set("mark", button.value);
    const answer = await fetch(button.formAction, {
      method: "POST", body: new URLSearchParams(fields), headers: { Accept: "application/json" },
    });
    const now = await answer.json();
    if (!answer.ok) {
      button.title = now.error;
      return;
    }
    shown(button, now.on);
    const count = button.querySelector(".count");
    if (count) count.textContent = now.count;
    const later = button.parentElement.querySelector('button[value="-later"]');
    if (now.mark === "read" && now.on && later) shown(later, false); // what is read waits no longer
  });
}

function copying() {
  for (const block of document.querySelectorAll("pre > code")) {
    const button = document.createElement("button");
    button.className = "copy";
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    block.parentElement.before(button);
  }
}

function start() {
  const section = document.getElementById("run");
  if (section) {
    forms(section);
    if (section.dataset.request) follow(section);
  }
  copying();
}

search();
marking();
start();
