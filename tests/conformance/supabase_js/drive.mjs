// Drives supabase-js as a test tells it, one JSON line a command on standard input:
//   {"join": topic, "binding": {...}}   {"leave": topic}   {"auth": token}   {"end": true}
// and tells what the client was told, one JSON line an event on standard output.
import { createInterface } from "node:readline";
import { createClient } from "@supabase/supabase-js";
import WebSocket from "ws";

const [url, key] = process.argv.slice(2);
const tell = (event) => process.stdout.write(JSON.stringify(event) + "\n");
const client = createClient(url, key, {
  auth: { persistSession: false, autoRefreshToken: false },
  realtime: { transport: WebSocket },
});
const channels = new Map();

const commands = {
  join({ join: topic, binding }) {
    const channel = client.channel(topic);
    channels.set(topic, channel);
    channel
      .on("postgres_changes", binding, (change) => tell({ topic, change }))
      .on("system", {}, (system) => tell({ topic, system }))
      .subscribe((status, error) => tell({ topic, status, error: error?.message ?? null }));
  },
  async leave({ leave: topic }) {
    tell({ topic, left: await client.removeChannel(channels.get(topic)) });
  },
  async auth({ auth: token }) {
    await client.realtime.setAuth(token);
  },
  async end() {
    await client.removeAllChannels();
    process.exit(0);
  },
};

createInterface({ input: process.stdin }).on("line", async (line) => {
  const command = JSON.parse(line);
  await commands[Object.keys(command)[0]](command);
});
tell({ ready: true });
