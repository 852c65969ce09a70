// LoRAs: one is chosen from the list, and stands below it with its strength.

const $ = (id) => document.getElementById(id);
export let loras = []; // in use: {name, strength, …}

export function listLoras(names) {
  $("lora-picker").hidden = !names.length;
  $("lora-names").replaceChildren(new Option("add one …", ""), ...names.map((name) => new Option(name.replace(/\.(safetensors|sft)$/, ""), name)));
}

function paintLoras() {
  $("loras").replaceChildren(
    ...loras.map((lora) => {
      const chip = document.createElement("li");
      const strength = Object.assign(document.createElement("input"), { type: "number", min: -2, max: 2, step: 0.05, value: lora.strength });
      strength.setAttribute("aria-label", `Strength of ${lora.name}`);
      strength.oninput = () => (lora.strength = Number(strength.value));
      const off = Object.assign(document.createElement("button"), { type: "button", textContent: "×", title: `Without ${lora.name}` });
      off.onclick = () => useLoras(loras.filter((each) => each !== lora));
      chip.append(lora.name.replace(/\.(safetensors|sft)$/, ""), strength, off);
      return chip;
    }),
  );
}

export function useLoras(these) {
  loras = these.map((each) => ({ ...each }));
  paintLoras();
}

$("lora-names").onchange = () => {
  useLoras([...loras, { name: $("lora-names").value, strength: 1 }]);
  $("lora-names").value = "";
};
