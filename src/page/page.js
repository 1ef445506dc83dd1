// Texts of marks show at once beside the pointer. Without this script the browser shows the same texts after a while.
"use strict";
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

const textOf = (mark) => {
  const title = mark.querySelector(":scope > title");
  if (title) {
    mark.dataset.tip = title.textContent;
    title.remove();
  } else if (mark.hasAttribute("title")) {
    mark.dataset.tip = mark.getAttribute("title");
    mark.removeAttribute("title");
  }
  return mark.dataset.tip;
};

document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest("svg *, tr, [data-server]");
  const text = mark && textOf(mark);
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, innerWidth - width - 8);
  const y = event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(8, x)}px, ${Math.max(8, y)}px)`;
});
document.addEventListener("pointerleave", () => { tip.hidden = true; });
