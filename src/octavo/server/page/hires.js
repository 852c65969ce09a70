// A second, larger pass: by how much, how it is made larger, and how much of it is drawn anew.

const $ = (id) => document.getElementById(id);
const field = (name) => $("form").elements[name];
const nearest = (pixels) => Math.max(16, Math.round(pixels / 16) * 16);
let kept = {}; // of a picture whose settings are used again: what the page has no field for
let usual = {};

export function listMethods(methods, defaults) {
  field("hires_method").replaceChildren(...methods.map((method) => new Option(method, method)));
  usual = defaults;
  useHires(null);
}

export function useHires(hires, used) {
  const { width, height, method, denoise, steps, prompt, ...rest } = { ...usual, ...hires };
  const across = hires && width / used.width;
  const exact = hires && width === nearest(used.width * across) && height === nearest(used.height * across);
  kept = hires ? { ...rest, ...(exact ? {} : { width, height }) } : {};
  field("hires_scale").value = hires ? Math.round(across * 1e4) / 1e4 : "";
  field("hires_method").value = method;
  field("hires_denoise").value = denoise;
  field("hires_steps").value = steps || 0;
  field("hires_prompt").value = prompt || "";
  $("hires").open = Boolean(hires);
}

export function echoHires(model) {
  const scale = Number(field("hires_scale").value);
  const sides = [kept.width || nearest(field("width").value * scale), kept.height || nearest(field("height").value * scale)];
  $("hires-size").textContent = scale ? `${field("width").value} × ${field("height").value}, then ${sides.join(" × ")}` : "Once, as large as above";
  const seen = model?.embedded && [model.preset.width, model.preset.height];
  if (scale && seen && sides.join() !== seen.join()) $("hires-size").textContent += `; this small model has only seen ${seen.join(" × ")}`;
  $("hires-denoise-now").textContent = field("hires_denoise").value;
  $("hires-steps-now").textContent = Number(field("hires_steps").value) || "as above";
}

// What is sent; nothing where the picture is drawn once.
export function hiresSettings() {
  const scale = Number(field("hires_scale").value);
  if (!scale || $("hires-fields").disabled) return {};
  const hires = { ...kept, method: field("hires_method").value, denoise: Number(field("hires_denoise").value) };
  if (!kept.width) hires.scale = scale;
  if (Number(field("hires_steps").value)) hires.steps = Number(field("hires_steps").value);
  if (field("hires_prompt").value.trim()) hires.prompt = field("hires_prompt").value;
  return { hires };
}

// Another size means the factor again.
for (const name of ["width", "height", "hires_scale"]) field(name).addEventListener("input", () => (delete kept.width, delete kept.height));
