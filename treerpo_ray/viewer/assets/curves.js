// Curves: the run's metrics as small charts, one a panel.

import { element, number } from "./dom.js";

const HEIGHT = 150;
const COLORS = ["--line-1", "--line-2"];
const MARKED_STEPS = 40;

/** Draw all panels into `root`; a click calls `chosen` with the learner step below it. */
export function drawCurves(root, curves, chosen) {
  const grid = element("div", { class: "curves" });
  root.append(grid);
  const charts = curves.panels.map((panel) => {
    const figure = element("figure", { class: "curve" });
    grid.append(figure);
    return drawPanel(figure, panel, curves, chosen);
  });
  const resized = new ResizeObserver(() => {
    for (const [figure, chart] of charts) chart.setSize({ width: figure.clientWidth, height: HEIGHT });
  });
  resized.observe(grid);
  return () => {
    resized.disconnect();
    for (const [, chart] of charts) chart.destroy();
  };
}

function drawPanel(figure, panel, curves, chosen) {
  const names = Object.values(panel.lines).filter((name) => curves.series[name]?.some(isThere));
  const interval = panel.interval?.every((name) => curves.series[name]?.some(isThere)) ? panel.interval : [];
  const columns = [...names, ...interval];
  const kept = curves.steps.map((_, i) => i).filter((i) => columns.some((name) => isThere(curves.series[name][i])));
  const data = [kept.map((i) => curves.steps[i]), ...columns.map((name) => kept.map((i) => curves.series[name][i]))];
  const shown = (value) => (value === null ? "–" : panel.is_share ? `${(100 * value).toFixed(1)} %` : sensible(value));
  const lines = names.map((name, n) => ({
    label: name,
    stroke: color(COLORS[n]),
    width: 1.6,
    spanGaps: true,
    points: { show: kept.length <= MARKED_STEPS, size: 4 },
  }));
  const ends = interval.map((name) => ({
    label: name,
    stroke: color("--faint-line"),
    width: 0.8,
    spanGaps: true,
    points: { show: false },
  }));
  const valuesAt = (find) => {
    const lines = Object.entries(panel.lines).filter(([, name]) => names.includes(name));
    const parts = lines.map(([label, name]) => `${label ? `${label} ` : ""}${shown(find(name) ?? null)}`);
    const ends = interval.map((name) => shown(find(name) ?? null));
    return parts.join(", ") + (ends.length ? ` [${ends.join(", ")}]` : "");
  };
  const last = valuesAt((name) => curves.series[name].findLast(isThere));
  figure.setAttribute("role", "img");
  figure.setAttribute("aria-label", `${panel.title} by learner step; last: ${last}`);
  figure.append(element("figcaption", {}, panel.title, element("output", {}, last)));
  const chart = new uPlot(
    {
      width: figure.clientWidth || 280,
      height: HEIGHT,
      scales: { x: { time: false }, y: { range: (_, low, high) => padded(low, high, panel.is_share) } },
      axes: [
        axis({ size: 24 }),
        axis({ size: 48, values: (_, ticks) => ticks.map((tick) => (panel.is_share ? `${Math.round(100 * tick)} %` : sensible(tick))) }),
      ],
      series: [{ label: "step" }, ...lines, ...ends],
      bands: interval.length ? [{ series: [names.length + 2, names.length + 1], fill: color("--band") }] : [],
      legend: { show: false },
      cursor: { y: false, points: { size: 6 } },
      hooks: {
        setCursor: [
          (self) => {
            const at = self.cursor.idx;
            const output = figure.querySelector("output");
            output.textContent =
              at === null || at === undefined
                ? last
                : `step ${data[0][at]}: ${valuesAt((name) => data[columns.indexOf(name) + 1][at])}`;
          },
        ],
      },
    },
    data,
    figure,
  );
  chart.over.addEventListener("click", () => {
    if (Number.isInteger(chart.cursor.idx)) chosen(data[0][chart.cursor.idx]);
  });
  return [figure, chart];
}

const isThere = (value) => value !== null && value !== undefined;

function axis(more) {
  return {
    stroke: color("--faint"),
    grid: { stroke: color("--grid"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
    gap: 3,
    ...more,
  };
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function padded(low, high, isShare) {
  if (low === null || high === null) return [0, 1];
  const more = (high - low || Math.abs(high) || 1) * 0.08;
  return isShare ? [Math.max(0, low - more), Math.min(1.02, high + more)] : [low - more, high + more];
}

function sensible(value) {
  const amount = Math.abs(value);
  if (amount >= 1000) return `${number(value / 1000, 1)}k`;
  if (amount >= 10 || value === 0) return String(Math.round(value * 10) / 10);
  return amount < 0.001 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}
