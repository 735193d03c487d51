// What this browser keeps, in IndexedDB: conversations, their turns, and the tokens of answers, which are read only
// where somebody looks at them.

const NAME = "nanochat_pl";
let database = null;

/** Open it. Returns false where the browser has none: then nothing is kept. */
export async function openStore() {
  try {
    database = await new Promise((resolve, reject) => {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore("conversations", { keyPath: "id" });
        opening.result.createObjectStore("turns", { keyPath: "id" }).createIndex("conversation", "conversation");
        opening.result.createObjectStore("tokens", { keyPath: "id" }).createIndex("conversation", "conversation");
      };
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(opening.error);
    });
    database.onversionchange = () => database.close();
    return true;
  } catch {
    return false;
  }
}

/** Do something in a transaction; resolves to the result of the request that `work` returns, once all is written. */
function within(names, mode, work) {
  if (database === null) return Promise.resolve(undefined);
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(names, mode);
    const request = work(transaction);
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? new Error("not stored"));
  });
}

export async function allConversations() {
  const found = (await within(["conversations"], "readonly", (t) => t.objectStore("conversations").getAll())) ?? [];
  return found.sort((a, b) => b.updated - a.updated);
}

export async function turnsOf(conversation) {
  const read = (t) => t.objectStore("turns").index("conversation").getAll(conversation);
  const found = (await within(["turns"], "readonly", read)) ?? [];
  return found.sort((a, b) => a.position - b.position);
}

function put(name, row) {
  return within([name], "readwrite", (t) => {
    const request = t.objectStore(name).put(row);
    t.commit(); // at once: the page may be about to be left
    return request;
  });
}

export const putConversation = (row) => put("conversations", row);

export const putTurn = (row) => put("turns", row);

export const putTokens = (row) => put("tokens", row);

export async function tokensOf(id) {
  return (await within(["tokens"], "readonly", (t) => t.objectStore("tokens").get(id)))?.tokens ?? [];
}

/** Remove turns, with the tokens of their answers. */
export function deleteTurns(turns) {
  return within(["turns", "tokens"], "readwrite", (t) => {
    for (const turn of turns) {
      t.objectStore("turns").delete(turn.id);
      for (const answer of turn.answers) {
        for (const version of answer.versions) t.objectStore("tokens").delete(version.id);
      }
    }
  });
}

export function deleteConversation(id) {
  return within(["conversations", "turns", "tokens"], "readwrite", (t) => {
    t.objectStore("conversations").delete(id);
    for (const name of ["turns", "tokens"]) {
      const store = t.objectStore(name);
      store.index("conversation").getAllKeys(id).onsuccess = (event) => {
        for (const key of event.target.result) store.delete(key);
      };
    }
  });
}
