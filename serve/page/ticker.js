// A worker that ticks: timers of a page that is hidden, as it is while another window is shared, are slowed down.

let timer = 0;

onmessage = ({ data: intervalMs }) => {
  clearInterval(timer);
  timer = intervalMs > 0 ? setInterval(() => postMessage(0), intervalMs) : 0;
};
