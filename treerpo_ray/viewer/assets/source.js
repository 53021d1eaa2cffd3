// Source: where the page gets the run from, its server or, in a page that was saved, itself.

/** The run's source; both kinds have the same functions, each of which gives a promise. */
export function openSource() {
  const data = document.getElementById("data");
  return data ? embedded(JSON.parse(data.textContent)) : served();
}

function served() {
  const texts = new Map();
  return {
    isLive: true,
    status: () => ask("status"),
    curves: () => ask("curves"),
    trees: (step) => ask("trees", { step }),
    tree: (ref) => ask("tree", { ref }),
    holding: (ref, text) => ask("holding", { ref, text }),
    search: (step, text) => ask("search", { step, text }),
    searchAnswers: (step, text) => ask("search_answers", { step, text }),
    change: () => ask("change"),
    problems: () => ask("problems"),
    forget: () => texts.clear(),
    async texts(ref, nodes) {
      const missing = nodes.filter((node) => !texts.has(`${ref} ${node}`));
      if (missing.length) {
        for (const text of await ask("texts", { ref, nodes: missing.join(",") }))
          texts.set(`${ref} ${text.index}`, text);
      }
      return nodes.map((node) => texts.get(`${ref} ${node}`));
    },
  };
}

async function ask(name, query = {}) {
  const response = await fetch(`api/${name}?${new URLSearchParams(query)}`);
  const answer = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function embedded(data) {
  const found = (part, ref) => {
    if (!Object.hasOwn(part, ref)) throw new Error(`this page does not hold tree ${ref}`);
    return part[ref];
  };
  return {
    isLive: false,
    status: async () => ({
      ...data.status,
      tree_steps: [...new Set(data.summaries.map((tree) => tree.step))],
    }),
    curves: async () => data.curves,
    trees: async (step) => data.summaries.filter((tree) => tree.step === step),
    tree: async (ref) => found(data.trees, ref),
    change: async () => data.change,
    problems: async () => data.problems,
    search: async (step, text) =>
      data.summaries
        .filter((tree) => tree.step === step)
        .map((tree) => [tree, foundIn(data.trees[`${step}:${tree.ticket}`], data.texts[`${step}:${tree.ticket}`], text)])
        .filter(([, found]) => found !== null)
        .map(([tree, found]) => ({ ticket: tree.ticket, ...found })),
    searchAnswers: async (step, text) =>
      Object.values(data.trees)
        .filter((tree) => tree.ticket === null && tree.step === step)
        .map((tree) => [tree, foundIn(tree, data.texts[tree.ref], text)])
        .filter(([, found]) => found !== null)
        .map(([tree, found]) => ({
          step,
          problem: tree.prompt_id,
          question: tree.question,
          reference: tree.answers[0] ?? "",
          total: tree.parent.length,
          verdict: tree.verdict[found.leaf],
          ...found,
        })),
    forget: () => {},
    texts: async (ref, nodes) => nodes.map((node) => found(data.texts, ref)[node]),
    async holding(ref, text) {
      const wanted = text.toLowerCase();
      return found(data.texts, ref)
        .filter((own) => (own.answer ?? own.text.join("")).toLowerCase().includes(wanted))
        .map((own) => own.index);
    },
  };
}

/** What the server's search tells of the answers of a tree, of its texts in the page; null if it
 * has no such. */
function foundIn(tree, texts, text) {
  const wanted = text.toLowerCase();
  const answers = new Map();
  for (const leaf of tree.verdict.keys()) {
    if (tree.verdict[leaf] === null) continue;
    let answer = "";
    for (let step = leaf; step >= 0; step = tree.parent[step]) answer = texts[step].text.join("") + answer;
    const whole = texts[leaf].answer ?? answer;
    if (whole.toLowerCase().includes(wanted)) answers.set(leaf, whole);
  }
  if (!answers.size) return null;
  const [leaf, answer] = answers.entries().next().value;
  const start = answer.toLowerCase().indexOf(wanted);
  const end = start + wanted.length;
  const passage = {
    before: answer.slice(Math.max(0, start - 50), start),
    text: answer.slice(start, end),
    after: answer.slice(end, end + 110),
  };
  return { num_answers: answers.size, leaf, passage };
}
