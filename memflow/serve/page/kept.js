// Which story this page shows stands in its address, so that a reload, a bookmark or another window finds it; the
// place where the viewer was is the tab's own.

export const storyInAddress = () => new URLSearchParams(location.hash.slice(1)).get("story");

export function putStoryInAddress(id) {
  const hash = id ? `#story=${encodeURIComponent(id)}` : "";
  if (location.hash !== hash) history.replaceState(null, "", location.pathname + location.search + hash);
}

/** Whether this tab showed the page before and goes on, as opposed to a link that was opened. */
export const wasReloaded = () => ["reload", "back_forward"].includes(performance.getEntriesByType("navigation")[0]?.type);

export function keepPlace(id, at, paused) {
  sessionStorage.setItem("memflow", JSON.stringify({ id, at, paused }));
}

export function keptPlace(id) {
  const kept = JSON.parse(sessionStorage.getItem("memflow") ?? "{}");
  return kept.id === id ? kept : {};
}
