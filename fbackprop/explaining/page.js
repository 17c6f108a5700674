"use strict";
(() => {
  const tip = document.getElementById("tip");
  const opened = (all) => document.querySelectorAll("main details").forEach((d) => { d.open = all; });
  document.getElementById("open-all")?.addEventListener("click", () => opened(true));
  document.getElementById("close-all")?.addEventListener("click", () => opened(false));

  // A link into a fold opens it.
  const follow = () => {
    const place = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = place; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    place?.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  if (location.hash) follow();

  // The index of a cell in its array, from the array's shape.
  const index = (cell, shape) => {
    if (!shape) return "";
    let flat = cell.parentElement.rowIndex * cell.parentElement.cells.length + cell.cellIndex;
    const found = [];
    for (const n of shape.split("×").map(Number).reverse()) { found.unshift(flat % n); flat = Math.floor(flat / n); }
    return `[${found.join(", ")}]`;
  };
  const words = (block, cell) => {
    const name = block.dataset.name, lines = [];
    if (cell) lines.push(`${name}${index(cell, block.dataset.shape)} = ${cell.dataset.x ?? cell.textContent}`);
    else lines.push(block.dataset.more ? `${name}: ${block.dataset.more}` : name);
    if (block.dataset.formula) lines.push(block.dataset.formula);
    return lines.join("\n");
  };
  let beside = null;
  const show = (text, near) => {
    tip.textContent = text;
    tip.hidden = false;
    beside = near;
    place();
  };
  const place = () => {
    const at = beside.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.left, 8), innerWidth - own.width - 8);
    const below = at.bottom + 8 + own.height < innerHeight;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${below ? at.bottom + 8 : Math.max(at.top - own.height - 8, 4)}px`;
  };
  const hide = () => { tip.hidden = true; };

  document.addEventListener("mouseover", (event) => {
    const block = event.target.closest?.(".numbers, [data-tip]");
    if (!block) return hide();
    if (block.dataset.tip) return show(block.dataset.tip, block);
    const cell = event.target.closest("td");
    show(words(block, cell), cell ?? block);
  });
  document.addEventListener("scroll", () => { if (!tip.hidden) place(); }, { passive: true, capture: true });

  // With the keyboard: Tab reaches an array, arrows its elements, Escape hides.
  let at = null;
  const stand = (cell) => {
    at?.classList.remove("at");
    at = cell;
    at?.classList.add("at");
    at?.scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  document.addEventListener("focusin", (event) => {
    stand(null);
    const block = event.target;
    if (block.dataset?.tip) show(block.dataset.tip, block);
    else if (block.classList?.contains("numbers")) show(words(block, null), block);
    else hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const block = document.activeElement, table = block?.classList?.contains("numbers") && block.querySelector(".matrix");
    if (!table || !moves[event.key]) return;
    const [down, right] = moves[event.key];
    const row = at ? at.parentElement.rowIndex + down : 0, column = at ? at.cellIndex + right : 0;
    const cell = table.rows[row]?.cells[column];
    if (!cell) return;
    event.preventDefault();
    stand(cell);
    requestAnimationFrame(() => show(words(block, cell), cell));
  });
  document.addEventListener("focusout", () => { stand(null); hide(); });
})();
