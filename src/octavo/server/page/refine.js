// A part of the finished picture on the stage is marked, and drawn anew.

const $ = (id) => document.getElementById(id);
const refine = $("refine");
const marked = Object.assign(document.createElement("div"), { className: "marked" });
let refining = null; // the picture
let submit; // asks the server for it

export function onRefine(how) {
  submit = how;
}

function echo() {
  $("refine-change-now").textContent = refine.elements.change.value;
}

export function refineOf(finished) {
  refining = finished;
  refine.hidden = false;
  refine.elements.prompt.value = (finished.refined || []).at(-1)?.request.prompt ?? finished.settings.prompt;
  $("frame").classList.add("marking");
  $("frame").append(marked);
  mark(null);
  echo();
  refine.scrollIntoView({ behavior: "smooth", block: "nearest" });
}

// Another picture is on the stage, or none.
export function leave(url) {
  if (refining && refining.url !== url) stop();
}

function stop() {
  refining = null;
  refine.hidden = true;
  $("frame").classList.remove("marking");
  marked.remove();
}

// Where the picture's pixels are on the screen; its element may have empty sides.
function pixelsOnScreen() {
  const picture = $("frame").querySelector("img");
  const box = picture.getBoundingClientRect();
  const scale = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight) || 1;
  const left = box.left + (box.width - picture.naturalWidth * scale) / 2;
  const top = box.top + (box.height - picture.naturalHeight * scale) / 2;
  return { left, top, scale, width: picture.naturalWidth, height: picture.naturalHeight };
}

const SIDES = ["x", "y", "width", "height"];
const region = () => SIDES.map((name) => Math.round(Number(refine.elements[name].value)));

function mark(part) {
  if (part) SIDES.forEach((name, i) => (refine.elements[name].value = part[i]));
  else for (const name of SIDES) refine.elements[name].value = "";
  const [x, y, width, height] = region();
  const { left, top, scale } = pixelsOnScreen();
  const frame = $("frame").getBoundingClientRect();
  marked.hidden = !(width && height);
  Object.assign(marked.style, {
    left: `${left - frame.left - $("frame").clientLeft + x * scale}px`,
    top: `${top - frame.top - $("frame").clientTop + y * scale}px`,
    width: `${width * scale}px`,
    height: `${height * scale}px`,
  });
}

let from = null; // where the pointer went down, in the picture's pixels
function pixelAt(event) {
  const { left, top, scale, width, height } = pixelsOnScreen();
  const within = (value, most) => Math.max(0, Math.min(most, Math.round(value / scale)));
  return [within(event.clientX - left, width), within(event.clientY - top, height)];
}
$("frame").onpointerdown = (event) => {
  if (!refining) return;
  event.preventDefault();
  $("frame").setPointerCapture(event.pointerId);
  from = pixelAt(event);
};
$("frame").onpointermove = (event) => {
  if (!from) return;
  const to = pixelAt(event);
  mark([0, 1].map((i) => Math.min(from[i], to[i])).concat([0, 1].map((i) => Math.abs(from[i] - to[i]))));
};
$("frame").onpointerup = $("frame").onpointercancel = () => (from = null);
window.addEventListener("resize", () => refining && mark(region()));
refine.oninput = (event) => {
  if (SIDES.includes(event.target.name)) mark(region());
  echo();
};
$("no-refine").onclick = stop;
refine.onsubmit = async (event) => {
  event.preventDefault();
  const told = (text) => (($("refine-trouble").hidden = !text), ($("refine-trouble").textContent = text));
  told("");
  try {
    await submit({
      picture: decodeURIComponent(refining.url.replace(/^octavo\/pictures\//, "")),
      region: region(),
      prompt: refine.elements.prompt.value,
      denoise: Number(refine.elements.change.value),
    });
    stop();
  } catch (error) {
    told(error.message);
  }
};
