/* Draws the plots that the page has queued in window.sparsityPlots, once plotly.js is there, and
   gives them the page's colours, which a reader may change. */
(function () {
  "use strict";

  function colours() {
    const page = getComputedStyle(document.body);
    const ground = page.backgroundColor;
    return { text: page.color, ground: /, 0\)$|transparent/.test(ground) ? "white" : ground };
  }

  function paint(box) {
    const now = colours();
    const line = document.documentElement.dataset.theme === "dark" ? "#4a4e54" : "#e3e5e8";
    return window.Plotly.relayout(box, {
      paper_bgcolor: now.ground,
      plot_bgcolor: now.ground,
      "font.color": now.text,
      "xaxis.gridcolor": line,
      "yaxis.gridcolor": line,
      "xaxis.zerolinecolor": line,
      "yaxis.zerolinecolor": line,
    });
  }

  /* A list for each choice, above the plot; an entry says what it sets in traces and layout. */
  function offer(box, choices) {
    const lists = Object.entries(choices).map(([heading, entries]) => {
      const label = document.createElement("label");
      const list = document.createElement("select");
      entries.forEach(([name]) => list.add(new Option(name)));
      list.addEventListener("change", () => {
        window.Plotly.update(box, ...entries[list.selectedIndex][1]);
      });
      label.append(heading, list);
      return label;
    });
    if (!lists.length) return;
    const row = document.createElement("div");
    row.className = "plot-choices";
    row.append(...lists);
    box.before(row);
  }

  function draw(plot) {
    const box = document.getElementById(plot.id);
    box.textContent = "";
    offer(box, plot.choices);
    window.Plotly.newPlot(box, plot.figure.data, plot.figure.layout, plot.config).then(() => {
      paint(box);
      new MutationObserver(() => paint(box)).observe(document.documentElement, {
        attributeFilter: ["data-theme"],
      });
      if (!plot.gene_page) return;
      box.on("plotly_click", (event) => {
        const gene = event.points[0].customdata[0];
        location.href = plot.gene_page + "#gene=" + encodeURIComponent(gene);
      });
      const pointer = (shape) => { box.querySelector(".nsewdrag").style.cursor = shape; };
      box.on("plotly_hover", () => pointer("pointer"));
      box.on("plotly_unhover", () => pointer(""));
    });
  }

  window.drawSparsityPlots = function () {
    const queue = window.sparsityPlots || [];
    queue.splice(0).forEach(draw);
    queue.push = draw;
  };
})();
