/* Unpacks plotly.js, which follows as gzip in base 85, and draws the plots that wait for it. */
(function (packed) {
  "use strict";
  if (window.sparsityPlotly) return;  // two plots on a page ask for one library
  window.sparsityPlotly = true;
  window.PlotlyConfig = { MathJaxConfig: "local" };

  function say(sentence) {
    (window.sparsityPlots || []).forEach((plot) => {
      document.getElementById(plot.id).textContent = sentence;
    });
  }

  /* Five digits of base 85 (alphabet of RFC 1924) are four bytes. */
  function unpack85(text) {
    const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
      + "!#$%&()*+-;<=>?@^_`{|}~";
    const value = new Uint8Array(128);
    for (let i = 0; i < 85; i += 1) value[digits.charCodeAt(i)] = i;
    const view = new DataView(new ArrayBuffer(text.length / 5 * 4));
    for (let i = 0, at = 0; i < text.length; i += 5, at += 4) {
      let number = 0;
      for (let k = 0; k < 5; k += 1) number = number * 85 + value[text.charCodeAt(i + k)];
      view.setUint32(at, number);
    }
    return new Uint8Array(view.buffer);
  }

  if (typeof DecompressionStream === "undefined") {
    say("This interactive plot needs a browser from 2023 or later; the picture on this page shows the same data.");
    return;
  }
  const bytes = unpack85(packed.slice(packed.indexOf(":") + 1)).subarray(0, parseInt(packed, 10));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  new Response(stream).blob().then((blob) => {
    const script = document.createElement("script");
    script.src = URL.createObjectURL(new Blob([blob], { type: "text/javascript" }));
    script.onload = () => {
      URL.revokeObjectURL(script.src);
      window.drawSparsityPlots();
    };
    script.onerror = () => say("plotly.js could not be started.");
    document.head.appendChild(script);
  }).catch(() => say("plotly.js could not be unpacked."));
})("@PACKED@");
