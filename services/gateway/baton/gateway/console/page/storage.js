// What the browser remembers, by the name of its storage. Where the user blocks storage, even looking
// at it throws; a value then lasts as long as the page.

const remembered = new Map();

export function recall(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return remembered.get(key) ?? null;
  }
}

export function remember(storage, key, value) {
  remembered.set(key, value);
  try {
    window[storage].setItem(key, value);
  } catch {
    // Kept above.
  }
}

export function forget(storage, key) {
  remembered.delete(key);
  try {
    window[storage].removeItem(key);
  } catch {
    // Forgotten above.
  }
}
