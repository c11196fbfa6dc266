"use strict";
// Figures are drawn when they come near the window, and all of those that are not folded away before printing.
const figures = JSON.parse(document.getElementById("figures").textContent);
const boxes = [...document.querySelectorAll(".figure")];
function draw(box) {
  if (box.dataset.drawn || !box.offsetWidth) return;
  box.dataset.drawn = "yes";
  const figure = figures[box.dataset.figure];
  Plotly.newPlot(box, figure.data, { ...figure.layout, width: box.clientWidth }, { displayModeBar: false });
  for (const svg of box.querySelectorAll("svg")) svg.setAttribute("aria-hidden", "true");
}
function fit(box, width) {
  if (box.dataset.drawn && width && box._fullLayout && box._fullLayout.width !== width) Plotly.relayout(box, { width });
}
const near = new IntersectionObserver(
  (seen) => seen.filter((one) => one.isIntersecting).forEach((one) => draw(one.target)), { rootMargin: "800px" });
boxes.forEach((box) => near.observe(box));
addEventListener("resize", () => boxes.forEach((box) => fit(box, box.clientWidth)));
function drawAll() { boxes.forEach(draw); }
addEventListener("beforeprint", () => {
  drawAll();
  boxes.forEach((box) => fit(box, box.closest(".panels, .beside") ? 330 : 680));
});
addEventListener("afterprint", () => boxes.forEach((box) => fit(box, box.clientWidth)));
