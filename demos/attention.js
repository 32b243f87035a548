// Attention maps: a click on an example's picture opens a panel beneath its row, with the map of each block over it.
"use strict";
const EXAMPLES = JSON.parse(document.getElementById("attention").textContent);
const PANEL = document.getElementById("panel").content.firstElementChild;
const VEIL = [12, 12, 44], DARKEST = 0.86;

// Shares of attention of one example: shares[block][token][patch], over patches row by row.
function decode(example) {
  const bytes = Uint8Array.from(atob(example.bytes), (letter) => letter.charCodeAt(0));
  const size = example.rows * example.columns;
  let at = 0;
  return example.largest.map((tokens) => tokens.map((largest) => {
    const shares = Array.from(bytes.subarray(at, at + size), (byte) => (byte / 255) * largest);
    at += size;
    return shares;
  }));
}

function mean(lists) {
  return lists[0].map((_, place) => lists.reduce((sum, list) => sum + list[place], 0) / lists.length);
}

// Draws a map over a picture: the more attention a patch gets, the less it is veiled.
function draw(canvas, example, shares) {
  canvas.width = example.columns;
  canvas.height = example.rows;
  canvas.style.width = `${(100 * example.columns) / example.extent[1]}%`;
  canvas.style.height = `${(100 * example.rows) / example.extent[0]}%`;
  const pixels = new ImageData(example.columns, example.rows), highest = Math.max(...shares) || 1;
  shares.forEach((share, place) => {
    pixels.data.set([...VEIL, 255 * DARKEST * (1 - share / highest)], 4 * place);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function stage(source) {
  const box = document.createElement("span"), picture = document.createElement("img");
  box.className = "stage";
  picture.src = source;
  picture.alt = "";
  box.append(picture, document.createElement("canvas"));
  return box;
}

function percent(share) {
  const value = 100 * share;
  return `${value.toFixed(value >= 9.95 ? 0 : value >= 0.95 ? 1 : 2)}%`;
}

// A row of buttons of which one is pressed; `choose` gets its index.
function choices(box, labels, choose) {
  const buttons = labels.map((label, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(label);
    button.addEventListener("click", () => press(index));
    return button;
  });
  function press(chosen) {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", index === chosen));
    choose(chosen);
  }
  box.append(...buttons);
  return { buttons, press };
}

function open(card) {
  const example = EXAMPLES[card.id], shares = decode(example), source = card.querySelector("img").src;
  const panel = PANEL.cloneNode(true), find = (name) => panel.querySelector(name);
  panel.setAttribute("aria-label", `Where the model looked to answer “${example.answer}”`);
  find("h3").textContent = example.question;
  find(".said").append(...Array.from(card.querySelectorAll("[data-said]"), (node) => node.cloneNode(true)));
  const large = stage(source);
  large.querySelector("img").alt = card.querySelector("img").alt;
  find(".large").prepend(large);

  let block = 0, token = 0;
  // The first choice of each row is the mean over all others.
  function chosen(which) {
    const blocks = which === 0 ? shares : [shares[which - 1]];
    return mean(blocks.map((tokens) => (token === 0 ? mean(tokens) : tokens[token - 1])));
  }
  function rest(kind) {
    const blocks = block === 0 ? example[kind] : [example[kind][block - 1]];
    const values = blocks.flatMap((tokens) => (token === 0 ? tokens : [tokens[token - 1]]));
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  }
  const names = ["mean", ...example.blocks.map((position) => `layer ${position}`)];
  const thumbnails = names.map((name) => {
    const label = document.createDocumentFragment();
    label.append(stage(source), name);
    return label;
  });
  const blockRow = choices(find(".blocks"), thumbnails, (index) => { block = index; show(); });
  const tokenRow = choices(find(".tokens"), ["whole answer", ...example.tokens], (index) => { token = index; show(); });
  function show() {
    const map = chosen(block);
    draw(large.querySelector("canvas"), example, map);
    blockRow.buttons.forEach((button, index) => draw(button.querySelector("canvas"), example, chosen(index)));
    const words = token === 0 ? "the whole answer" : `“${example.tokens[token - 1]}”`;
    const highest = Math.max(...map), even = map.reduce((sum, share) => sum + share, 0) / map.length;
    const beside = rest("padding");
    find(".numbers").textContent =
      `${block === 0 ? "Mean of all blocks" : `Block after layer ${example.blocks[block - 1]}`}, ${words}: the brightest ` +
      `of ${map.length} places holds ${percent(highest)} of the attention, ${(highest / even || 0).toPrecision(2)} times ` +
      `the mean of all places. ${percent(rest("cls"))} goes to the summary (CLS) tokens of the tiles` +
      (beside > 0.0005 ? `, ${percent(beside)} to the black border beside the picture.` : ".");
  }
  tokenRow.press(0);
  blockRow.press(0);
  find(".close").addEventListener("click", () => { close(); card.querySelector(".look").focus(); });
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") find(".close").click(); });
  card.after(panel);
  card.querySelector(".look").setAttribute("aria-expanded", "true");
}

function close() {
  document.querySelector(".panel")?.remove();
  document.querySelectorAll(".look").forEach((button) => button.setAttribute("aria-expanded", "false"));
}

document.querySelectorAll(".look").forEach((button) => {
  button.addEventListener("click", () => {
    const wasOpen = button.getAttribute("aria-expanded") === "true";
    close();
    if (!wasOpen) open(button.closest(".card"));
    document.querySelector(".panel")?.scrollIntoView({ block: "nearest" });
  });
});
// One example is open from the beginning: the one that the address names, such as index.html#openmoji-2, or the first.
const first = document.getElementById(location.hash.slice(1)) ?? document;
if (document.querySelector(".look")) open((first.querySelector(".look") ?? document.querySelector(".look")).closest(".card"));
