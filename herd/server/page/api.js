// What is asked of the server. An error is one sentence that says what helps.

async function request(method, path, body) {
  const init = { method };
  if (body instanceof FormData) init.body = body;
  else if (body !== undefined) {
    init.headers = { "Content-Type": "application/json" };
    init.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(`/api${path}`, init);
  } catch {
    throw new Error("The server cannot be reached. Is it running? What you wrote is still here: try again.");
  }
  if (response.status === 204) return null;
  const told = await response.json().catch(() => null);
  if (!response.ok) {
    const error = new Error(told?.error?.message || `The server answered with ${response.status}.`);
    error.status = response.status;
    throw error;
  }
  return told;
}

export const get = (path) => request("GET", path);
export const post = (path, body) => request("POST", path, body);
export const put = (path, body) => request("PUT", path, body);
export const patch = (path, body) => request("PATCH", path, body);
export const remove = (path) => request("DELETE", path);

const BATCH_FILES = 200, BATCH_BYTES = 64 << 20;

// Uploads in batches, so that no request is too large. Files are {name, file}.
export async function upload(context, files, told) {
  let at = 0;
  while (at < files.length) {
    const form = new FormData();
    let bytes = 0, number = 0;
    while (at < files.length && number < BATCH_FILES && (number === 0 || bytes + files[at].file.size <= BATCH_BYTES)) {
      form.append("files", files[at].file, "file");
      form.append("names", files[at].name);
      bytes += files[at].file.size;
      at++, number++;
    }
    await post(`/contexts/${context}/files`, form);
    told(at, files.length);
  }
}

// Events, for as long as the page is seen: browsers allow few connections, and tabs share them.
export function listen(heard, state) {
  let source = null;
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource("/api/events");
    source.onmessage = (message) => heard(JSON.parse(message.data));
    source.onopen = () => state(true);
    source.onerror = () => {
      state(false);
      source.close();
      source = null;
      setTimeout(open, 1000);
    };
  };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) open();
    else if (source) source = void source.close();
  });
  open();
}
