// Asks two models the same, and writes both answers as they come; all that a model writes is put in as text.
"use strict";

const part = (id) => document.getElementById(id);
const sides = [...document.querySelectorAll(".answer")].map((section) => ({
  model: section.querySelector("select"),
  speed: section.querySelector(".speed"),
  reasoning: section.querySelector(".reasoning"),
  content: section.querySelector(".content"),
}));
let stop = null;

async function listModels() {
  const answer = await fetch("v1/models");
  if (!answer.ok) throw new Error(await problemOf(answer));
  const names = (await answer.json()).data.map((card) => card.id);
  sides.forEach((side, i) => {
    side.model.replaceChildren(...names.map((name) => new Option(name, name)));
    side.model.selectedIndex = Math.min(i, names.length - 1);
  });
  part("ask").disabled = false; // only now is there somebody to ask
}

async function problemOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

async function* eventsOf(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const text = event.replace(/^data: /, "");
      if (text === "[DONE]") return;
      yield JSON.parse(text);
    }
  }
}

async function answerOn(side, question, signal) {
  side.reasoning.textContent = side.content.textContent = side.speed.textContent = "";
  side.content.classList.remove("problem");
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal,
      body: JSON.stringify({
        model: side.model.value,
        messages: [{ role: "user", content: question }],
        temperature: Number(part("temperature").value),
        max_tokens: Number(part("tokens").value) || null,
        stream: true,
      }),
    });
    if (!answer.ok) throw new Error(await problemOf(answer));
    let first = 0;
    let tokens = 0;
    for await (const event of eventsOf(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const now = performance.now();
      first = first || now;
      tokens += 1; // a chunk each
      const { content, reasoning_content: reasoning, tool_calls: calls } = event.choices[0].delta;
      if (reasoning) side.reasoning.append(reasoning);
      if (content) side.content.append(content);
      for (const call of calls ?? []) side.reasoning.append(call.function.name ?? "", call.function.arguments ?? "");
      if (now > first) side.speed.textContent = `${((tokens - 1) / (now - first) * 1000).toFixed(1)} tokens/s`;
    }
    side.speed.textContent = side.speed.textContent || `${tokens} tokens`;
  } catch (error) {
    if (error.name === "AbortError") return;
    side.content.classList.add("problem");
    side.content.append(String(error.message));
  }
}

async function askBoth() {
  const question = part("question").value;
  if (!question.trim() || part("ask").disabled) return;
  stop = new AbortController();
  part("ask").disabled = true;
  part("stop").disabled = false;
  await Promise.all(sides.map((side) => answerOn(side, question, stop.signal)));
  stop = null;
  part("ask").disabled = false;
  part("stop").disabled = true;
}

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  askBoth();
});
part("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) askBoth();
});
part("stop").addEventListener("click", () => stop && stop.abort());
listModels().catch((error) => { part("problem").textContent = error.message; });
