// The page of Octavo's server. No build, no library: the page asks /octavo/… and listens to /octavo/events.

import { echoHires, hiresSettings, listMethods, useHires } from "./hires.js";
import { listLoras, loras, useLoras } from "./loras.js";
import { leave, onRefine, refineOf } from "./refine.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const field = (name) => form.elements[name];
const SIZES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];

let models = [];
let jobs = new Map(); // by id, as the server tells them
let shown = null; // {job, picture} on the stage, or {pair: [a, b]}
let pairs = new Map(); // id of a job → id of the one to compare it with
let startPicture = null; // name of an uploaded picture

// The server

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(await said(answer));
  return answer;
}

async function said(answer) {
  const body = await answer.json().catch(() => ({}));
  const text = body.error?.message || body.detail || body.message;
  return typeof text === "string" ? text : `The server answered ${answer.status}.`;
}

const asJson = async (path, options) => (await ask(path, options)).json();
const send = (path, body) =>
  asJson(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

function image(src, alt = "") {
  return Object.assign(new Image(), { src, alt });
}

// The form

function model() {
  return models.find((each) => each.name === field("model").value);
}

function suit() {
  const now = model();
  if (!now) return;
  for (const name of ["width", "height", "steps", "guidance_scale", "shift"]) field(name).value = now.preset[name];
  for (const name of ["sampler", "schedule"]) field(name).value = now.preset[name];
  for (const side of ["width", "height"]) field(side).max = now.max_side;
  field("prompt").title = now.words ? `Words that this small model knows: ${now.words}` : "";
  about();
}

function about() {
  const now = model();
  const other = field("other");
  $("model-about").textContent = now?.about || "";
  const kept = other.value;
  other.replaceChildren(
    new Option("nothing", ""),
    ...models.filter((each) => each.name !== now?.name).map((each) => new Option(each.title, each.name)),
  );
  other.value = kept;
  if (other.selectedIndex < 0) other.value = "";
  const area = now ? now.preset.width * now.preset.height : 1;
  $("sizes").replaceChildren(
    ...SIZES.map(([across, down]) => {
      const unit = Math.sqrt(area / (across * down));
      const chip = Object.assign(document.createElement("button"), { type: "button", textContent: `${across}:${down}` });
      const [width, height] = [across, down].map((side) => Math.max(16, Math.min(now.max_side, Math.round((side * unit) / 16) * 16)));
      chip.title = `${width} × ${height}`;
      chip.onclick = () => {
        for (const [side, pixels] of [["width", width], ["height", height]]) {
          field(side).value = pixels;
          field(side).dispatchEvent(new Event("input", { bubbles: true }));
        }
      };
      return chip;
    }),
  );
  echo();
}

function echo() {
  for (const [name, id] of [["steps", "steps-now"], ["guidance_scale", "guidance-now"], ["shift", "shift-now"], ["denoise", "denoise-now"], ["strength", "strength-now"]])
    $(id).textContent = field(name).value;
  // A picture to start from has one pass.
  $("hires-fields").disabled = Boolean(startPicture) && field("use").value === "start";
  echoHires(model());
}

function settings() {
  const number = (name) => Number(field(name).value);
  const seed = field("seed").value.trim();
  return {
    prompt: field("prompt").value,
    negative_prompt: field("negative_prompt").value,
    width: number("width"),
    height: number("height"),
    steps: number("steps"),
    guidance_scale: number("guidance_scale"),
    sampler: field("sampler").value,
    schedule: field("schedule").value,
    speed: field("speed").value,
    shift: number("shift"),
    batch: number("batch"),
    // As text: a seed may have more digits than a number here can hold.
    seed: seed || null,
    model: field("model").value,
    loras,
    ...hiresSettings(),
    ...(startPicture ? useOfPicture(number) : {}),
  };
}

function useOfPicture(number) {
  if (field("use").value === "start") return { image: startPicture, denoise: number("denoise") };
  return { controls: [{ image: startPicture, type: "canny", preprocess: "canny", strength: number("strength") }] };
}

async function draw(asked, other) {
  if (other && !asked.seed) asked.seed = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  const first = accepted(await send("octavo/jobs", asked));
  if (other) {
    pairs.set(first.id, accepted(await send("octavo/jobs", { ...asked, model: other })).id);
  }
  stage({ job: first.id });
}

// Its events may have come before the answer, and then know more.
function accepted(told) {
  return jobs.get(told.id) || take(told);
}

form.onsubmit = async (event) => {
  event.preventDefault();
  trouble("");
  await draw(settings(), field("other").value).catch((error) => trouble(error.message));
};
form.oninput = echo;
field("use").onchange = () => {
  const edges = field("use").value === "edges";
  $("strength").hidden = !edges;
  $("change").hidden = edges;
  echo();
};
field("model").onchange = suit;
$("any-seed").onclick = () => (field("seed").value = "");
field("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
};

function trouble(text) {
  $("trouble").hidden = !text;
  $("trouble").textContent = text;
}

async function upload(file) {
  if (!file) return;
  try {
    startPicture = (await asJson("octavo/pictures", { method: "POST", headers: { "Content-Type": file.type || "image/png" }, body: file })).name;
    $("start-picture").src = URL.createObjectURL(file);
    $("start-picture").hidden = $("no-picture").hidden = false;
    $("start-from").open = true;
    echo();
    trouble("");
  } catch (error) {
    trouble(error.message);
  }
}

$("file").onchange = () => upload($("file").files[0]);
$("no-picture").onclick = () => {
  startPicture = null;
  $("file").value = "";
  $("start-picture").hidden = $("no-picture").hidden = true;
  echo();
};
const drop = $("drop");
drop.ondragover = (event) => (event.preventDefault(), drop.classList.add("over"));
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => (event.preventDefault(), drop.classList.remove("over"), upload(event.dataTransfer.files[0]));

function useThese(used) {
  field("model").value = models.find((each) => each.called === used.model)?.name ?? field("model").value;
  about();
  for (const name of ["prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "sampler", "schedule", "shift", "seed", "speed"])
    if (used[name] !== undefined) field(name).value = used[name];
  field("batch").value = 1;
  useLoras(used.loras || []);
  useHires(used.hires, used);
  echo();
  window.scrollTo({ top: 0, behavior: "smooth" });
  field("prompt").focus();
}

// Stage, queue, gallery

function stage(what) {
  shown = what;
  paintStage();
  paintGallery();
}

// What stands on the page is made anew only when there is something else to see: an element that is replaced while it is
// pressed, or a picture that is loaded again, would be lost to whoever uses it.
function put(box, key, make) {
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...make());
}

const note = (textContent, className = "hint") => Object.assign(document.createElement("p"), { textContent, className });

function paintStage() {
  const job = shown && jobs.get(shown.job);
  const frame = $("frame");
  $("progress").hidden = true;
  const other = job && jobs.get(pairs.get(job.id));
  const finished = job?.pictures[shown.picture ?? 0];
  const otherFinished = other?.pictures[shown.picture ?? 0];
  leave(finished?.url);
  put($("about"), finished ? [finished.url, job.seconds, other?.seconds].join() : "", () => (finished ? aboutPicture(job, finished, other) : []));
  if (!job) return;
  if (finished && otherFinished) put(frame, `${finished.url} ${otherFinished.url}`, () => [slider(job, finished, other, otherFinished)]);
  else if (finished) put(frame, finished.url, () => [image(finished.url, job.settings.prompt)]);
  else if (job.preview) put(frame, `preview ${job.id}`, () => [Object.assign(new Image(), { src: job.preview, alt: "unfinished", className: "unfinished" })]);
  else if (job.error) put(frame, `error ${job.id}`, () => [note(job.error)]);
  else if (!frame.querySelector("img")) put(frame, "waiting", () => [note("…")]);
  const busy = [job, other].find((each) => each && !each.over);
  if (busy) paintProgress(busy);
}

function paintProgress(job) {
  $("progress").hidden = false;
  const bar = $("progress").querySelector("progress");
  const { value = 0, max = 0 } = job.progress || {};
  if (max) bar.value = value / max;
  else bar.removeAttribute("value");
  const words = { queued: "waiting", running: { encode: "reading the prompt", decode: "finishing" }[job.stage] || `step ${value} of ${max || "…"}` };
  $("progress").querySelector("span").textContent = words[job.state] || job.state;
}

const sizeOf = ({ width, height, hires }) => `${width}×${height}` + (hires ? `, then ${hires.width}×${hires.height} (${hires.method}, ${hires.denoise})` : "");

function aboutPicture(job, finished, other) {
  const used = finished.settings;
  const lines = [
    ["p", used.prompt],
    ["p", `${used.model} · ${sizeOf(used)} · ${used.steps} steps · guidance ${used.guidance_scale} · ${used.sampler}, ${used.schedule} · seed ${used.seed}` + (used.speed && used.speed !== "exact" ? ` · ${used.speed}` : "") +
      (job.seconds ? ` · ${job.seconds.toFixed(1)} s` : "") + (other?.seconds ? ` and ${other.seconds.toFixed(1)} s` : ""), "hint"],
  ].map(([tag, textContent, className = ""]) => Object.assign(document.createElement(tag), { textContent, className }));
  if (used.loras?.length) lines.push(note(`with ${used.loras.map((each) => `${each.name} ${each.strength}`).join(", ")}`));
  if (used.hires?.prompt) lines.push(note(`second pass: ${used.hires.prompt}`));
  if (used.negative_prompt) lines.splice(1, 0, note(`without ${used.negative_prompt}`));
  for (const { region, request } of finished.refined || []) lines.push(note(`refined${region ? ` at ${region.join(", ")}` : ""}: ${request.prompt}`));
  const acts = Object.assign(document.createElement("div"), { className: "acts" });
  const act = (textContent, onclick) => acts.append(Object.assign(document.createElement("button"), { textContent, onclick, type: "button" }));
  act("Use these", () => useThese(used));
  act("Start from this", async () => upload(await (await ask(finished.url)).blob()));
  if (!other) act("Refine a part", () => refineOf(finished));
  for (const each of models.filter((one) => one.called !== used.model).slice(0, 3))
    act(`Compare with ${each.title}`, () => compare(job, used, each.name));
  acts.append(Object.assign(document.createElement("a"), { textContent: "Save", href: finished.url, download: finished.name }));
  return [...lines, acts];
}

onRefine(async (asked) => {
  const job = accepted(await send("octavo/refine", { ...asked, model: field("model").value, loras }));
  stage({ job: job.id });
});

async function compare(job, used, name) {
  const { version, model, image, mask, mask_grow, mask_feather, outpaint, controls, ...same } = used; // pictures to start from are not kept
  try {
    pairs.set(job.id, accepted(await send("octavo/jobs", { ...same, seed: String(used.seed), batch: 1, model: name })).id);
    stage({ job: job.id, picture: shown.picture });
  } catch (error) {
    trouble(error.message);
  }
}

function slider(left, leftPicture, right, rightPicture) {
  const box = Object.assign(document.createElement("div"), { className: "compare" });
  const label = (job, used) => Object.assign(document.createElement("b"), { textContent: models.find((each) => each.called === used.model)?.title || used.model });
  const range = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, step: 0.1, value: 50 });
  range.setAttribute("aria-label", "How much of each picture is seen");
  range.oninput = () => box.style.setProperty("--at", `${range.value}%`);
  box.append(image(leftPicture.url, left.settings.prompt), image(rightPicture.url), document.createElement("i"), label(left, leftPicture.settings), label(right, rightPicture.settings), range);
  return box;
}

// A line stays the same element as long as its job is open: a button that is made anew with every step cannot be pressed.
const rows = new Map();

function paintQueue() {
  const open = [...jobs.values()].filter((job) => !job.over || (job.error && job.fresh)).sort((a, b) => a.created - b.created);
  const ids = new Set(open.map((job) => job.id));
  for (const [id, line] of rows) if (!ids.has(id)) (line.remove(), rows.delete(id));
  open.forEach((job, at) => {
    if (!rows.has(job.id)) rows.set(job.id, makeLine(job.id));
    const line = rows.get(job.id);
    const [words, end] = line.children;
    const count = job.progress?.max ? ` ${job.progress.value}/${job.progress.max}` : "";
    words.textContent = job.error ? `${job.settings.prompt}: ${job.error}` : `${job.state}${count} · ${job.settings.prompt}`;
    words.className = job.error ? "bad" : "";
    end.textContent = job.over ? "×" : "Cancel";
    const there = $("queue").children[at];
    if (there !== line) $("queue").insertBefore(line, there || null);
  });
}

function makeLine(id) {
  const line = document.createElement("li");
  const words = document.createElement("span");
  const end = Object.assign(document.createElement("button"), { type: "button" });
  words.onclick = () => stage({ job: id });
  end.onclick = async () => {
    const job = jobs.get(id);
    job.fresh = false;
    if (!job.over) await ask(`octavo/jobs/${id}`, { method: "DELETE" }).catch((error) => trouble(error.message));
    paintQueue();
  };
  line.append(words, end);
  return line;
}

function paintGallery() {
  const done = [...jobs.values()].filter((job) => job.pictures.length).sort((a, b) => b.created - a.created);
  const tiles = done.flatMap((job) => job.pictures.map((each, index) => ({ job, each, index })));
  const wanted = tiles.map(({ job, each, index }) => {
    const tile = (each.tile ??= makeTile(job, each, index));
    tile.setAttribute("aria-current", shown?.job === job.id && (shown.picture ?? 0) === index);
    return tile;
  });
  const kept = new Set(wanted);
  for (const tile of [...$("gallery").children]) if (!kept.has(tile)) tile.remove();
  wanted.forEach((tile, at) => {
    const there = $("gallery").children[at];
    if (there !== tile) $("gallery").insertBefore(tile, there || null);
  });
}

function makeTile(job, each, index) {
  const tile = Object.assign(document.createElement("button"), { type: "button", title: job.settings.prompt });
  tile.append(image(each.url, job.settings.prompt));
  tile.onclick = () => (stage({ job: job.id, picture: index }), $("stage").scrollIntoView({ behavior: "smooth", block: "nearest" }));
  return tile;
}

function take(told) {
  const known = jobs.get(told.id) || {};
  if (told.pictures.length === known.pictures?.length) delete told.pictures;
  const job = { ...known, ...told };
  job.fresh = known.fresh ?? !job.over;
  if (job.over) delete job.preview;
  jobs.set(job.id, job);
  return job;
}

// What happens

const onEvent = {
  job: (told) => {
    const before = jobs.get(told.id);
    take(told);
    paintQueue();
    if (!before?.pictures.length !== !told.pictures?.length) paintGallery();
    if (shown?.job === told.id || pairs.get(shown?.job) === told.id) paintStage();
  },
  progress: ({ id, ...now }) => {
    const job = jobs.get(id);
    if (!job || job.over) return;
    if (now.stage) job.stage = now.stage;
    if (now.max !== undefined) job.progress = now;
    job.state = "running";
    paintQueue();
    if (shown?.job === id || pairs.get(shown?.job) === id) paintProgress(job);
  },
  preview: ({ id, image: data, type }) => {
    const job = jobs.get(id);
    if (!job || job.over) return;
    job.preview = `data:${type};base64,${data}`;
    if (shown?.job !== id || job.pictures.length) return;
    const unfinished = $("frame").querySelector("img.unfinished");
    if (unfinished) unfinished.src = job.preview;
    else paintStage();
  },
  state: (told) => {
    $("state").textContent = told.problem || (told.ready ? told.headline : `${told.stage} …`);
  },
  gone: ({ id }) => {
    jobs.delete(id);
    paintQueue();
    paintGallery();
  },
};

async function listen() {
  for (;;) {
    try {
      const reader = (await ask("octavo/events")).body.pipeThrough(new TextDecoderStream()).getReader();
      await refresh();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) {
          const [, type] = part.match(/^event: (.*)$/m) || [];
          const [, data] = part.match(/^data: (.*)$/m) || [];
          if (data) onEvent[type]?.(JSON.parse(data));
        }
      }
    } catch {
      $("state").textContent = "the server does not answer; trying again …";
    }
    await new Promise((wake) => setTimeout(wake, 1500));
  }
}

let older = 0;
async function refresh(offset = 0) {
  const told = await asJson(`octavo/jobs?limit=60&offset=${offset}`);
  for (const job of told.jobs) take(job);
  older = offset + told.jobs.length;
  $("more").hidden = older >= told.total;
  paintQueue();
  paintGallery();
  if (!shown) {
    const newest = [...jobs.values()].filter((job) => job.pictures.length).sort((a, b) => b.created - a.created)[0];
    if (newest) stage({ job: newest.id, picture: 0 });
  }
}
$("more").onclick = () => refresh(older).catch((error) => trouble(error.message));

async function begin() {
  const told = await asJson("octavo/models");
  models = told.models;
  listLoras(told.loras);
  listMethods(told.methods, told.hires);
  field("model").replaceChildren(...models.map((each) => new Option(each.title, each.name)));
  field("model").value = told.default;
  for (const [name, values] of [["sampler", told.samplers], ["schedule", told.schedules], ["speed", told.speeds]])
    field(name).replaceChildren(...values.map((value) => new Option(value, value)));
  field("speed").value = told.speed;
  $("comfy-link").hidden = !told.comfy;
  suit();
}

listen();
begin().catch((error) => trouble(error.message));
