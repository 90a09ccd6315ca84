"use strict";
// Lays out every graph of the page; the wheel zooms, dragging pans, buttons do both.
const painted = () => new Promise(requestAnimationFrame);
(async () => {
  const viz = await Viz.instance();
  for (const drawing of document.querySelectorAll(".drawing")) {
    await painted(); // show one graph before the next is laid out
    const svg = viz.renderSVGElement(drawing.dataset.dot);
    svg.removeAttribute("width");
    svg.removeAttribute("height");
    drawing.replaceChildren(svg);
    const view = svgPanZoom(svg, { minZoom: 0.5, maxZoom: 100, zoomScaleSensitivity: 0.3 });

    const whole = () => view.resize().fit().center();
    const start = async () => {
      whole().zoomBy(1 / view.getSizes().realZoom);
      await painted(); // zooming moves nothing before
      const frame = drawing.getBoundingClientRect();
      const entry = svg.querySelector(".entry").getBoundingClientRect();
      const right = frame.left + frame.width / 2 - (entry.left + entry.width / 2);
      view.panBy({ x: right, y: frame.top + frame.height / 4 - entry.top });
    };
    const actions = { in: () => view.zoomIn(), out: () => view.zoomOut(), start, whole };
    for (const button of drawing.parentElement.querySelectorAll("button")) {
      button.addEventListener("click", actions[button.dataset.do]);
    }
    window.addEventListener("resize", () => view.resize());
    await start();
    drawing.dataset.drawn = "yes";
  }
})();
