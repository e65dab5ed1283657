// Streams a completion: npm install && npm run build && npm start -- 127.0.0.1:7000 "def quicksort(items):"
// BATON_PROTOS names the folder of the .proto files, BATON_API_KEY the key where the scheduler asks for one.
import * as path from "node:path";

import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

interface GenerateResponse {
  text: string;
  finish_reason: string;
  usage: { prompt_tokens: number; completion_tokens: number } | null;
}

const TIMEOUT_MS = 60_000;
const protos = process.env.BATON_PROTOS ?? path.join(__dirname, "../../../protos");
const definition = protoLoader.loadSync("baton/v1/inference.proto", {
  includeDirs: [protos],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
});
const [address = "127.0.0.1:7000", prompt = "def quicksort(items):"] = process.argv.slice(2);
const { InferenceService } = (grpc.loadPackageDefinition(definition) as any).baton.v1;
const client = new InferenceService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (process.env.BATON_API_KEY) {
  metadata.set("authorization", `Bearer ${process.env.BATON_API_KEY}`);
}

const request = { text: prompt, sampling: { max_tokens: 64, temperature: 0 } };
const call: grpc.ClientReadableStream<GenerateResponse> = client.Generate(request, metadata, {
  deadline: Date.now() + TIMEOUT_MS,
});
call.on("data", (message: GenerateResponse) => {
  process.stdout.write(message.text);
  if (message.usage) {
    const { prompt_tokens, completion_tokens } = message.usage;
    process.stdout.write(`\n${message.finish_reason}: ${prompt_tokens} + ${completion_tokens} tokens\n`);
  }
});
call.on("error", (error: grpc.ServiceError) => {
  const [reason = grpc.status[error.code]] = error.metadata.get("baton-error-reason");
  console.error(`${reason}: ${error.details}`);
  process.exitCode = 1;
});
call.on("close", () => client.close());
