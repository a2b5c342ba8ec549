/* Draws the plots that the page has queued in window.sparsityPlots, each when a reader comes near it:
   plotly.js, by far the largest file of a page, is fetched for the first of them. A plot that stands
   in for a figure takes its picture's place on the screen; the picture is there before, on paper, and
   where something fails. Plots have the page's colours, which a reader may change. */
(function () {
  "use strict";

  const NEAR = "600px";
  const own = document.currentScript && document.currentScript.src;
  let library;

  /* plotly.js, which lies beside this script in the book, and is in the page elsewhere. */
  function plotly() {
    if (window.Plotly) return Promise.resolve();
    library = library || new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: own.replace("plots.js", "plotly.js") });
      Object.assign(script, { onload: resolve, onerror: reject });
      document.head.append(script);
    });
    return library;
  }

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

  function draw(plot, box, figure) {
    if (figure) {
      box.parentElement.style.display = "none";  // what is left there is empty
      figure.prepend(box);
      figure.classList.add("has-plot");
    }
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

  function wait(plot) {
    const box = document.getElementById(plot.id);
    const figure = plot.figure_id && document.getElementById(plot.figure_id);
    if (figure) box.style.display = "none";
    const observer = new IntersectionObserver((seen) => {
      if (!seen.some((one) => one.isIntersecting)) return;
      observer.disconnect();
      plotly().then(() => {
        box.style.display = "";
        draw(plot, box, figure);
      });
    }, { rootMargin: NEAR });
    observer.observe(figure || box);
  }

  const queue = window.sparsityPlots || [];
  if (!Array.isArray(queue)) return;  // a page with several plots runs this once for each
  window.sparsityPlots = { push: wait };
  queue.forEach(wait);
})();
