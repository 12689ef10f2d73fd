// Brings the page up to date: asks for the state, and replaces the parts that have changed.
"use strict";

const EVERY_MS = 3000;
const away = document.getElementById("away");
const study = document.title.split(" · ")[0];

async function update() {
  if (document.hidden) return;
  let answer;
  try {
    const response = await fetch("/api/state", { cache: "no-store", signal: AbortSignal.timeout(20000) });
    if (response.status === 401) {
      location.assign("/login");
      return;
    }
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    answer = await response.json();
  } catch (error) {
    say(`The page is out of date: ${error instanceof TypeError ? "the server does not answer" : error.message}.`);
    return;
  }
  say("");
  for (const [part, html] of Object.entries(answer.parts)) {
    const element = document.getElementById(part);
    // what the server has sent is escaped there; a browser writes it otherwise, so what was sent is compared
    if (element && element.sent !== html) {
      element.sent = html;
      element.innerHTML = html;
    }
  }
  document.title = `${answer.state.study || study} · ${answer.state.status} · oncofed`;
}

function say(text) {
  if (away.textContent !== text) away.textContent = text;
}

async function keep() {
  await update();
  setTimeout(keep, EVERY_MS);
}

document.addEventListener("visibilitychange", update);
setTimeout(keep, EVERY_MS);
