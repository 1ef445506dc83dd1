// Servers of a document can be picked out.
const pick = (mark) => {
  const holder = mark?.closest("[data-server]");
  const article = holder?.closest("article");
  for (const other of document.querySelectorAll("article.picked")) {
    if (other !== article) other.classList.remove("picked");
  }
  if (!article) return;
  article.classList.add("picked");
  for (const area of article.querySelectorAll("[data-server]")) {
    area.classList.toggle("chosen", area.dataset.server === holder.dataset.server);
  }
};

document.addEventListener("pointermove", (event) => pick(event.target.closest("svg *, tr, [data-server]")));
