import assert from "node:assert/strict";
import { it } from "node:test";
import { calculate } from "../examples/calculator.js";

it("the example's calculator adds, subtracts and multiplies", () => {
  assert.deepEqual(["1 + 2 - 10", "-3*4+2", "7", "2 - -1", "1/0", ""].map(calculate), ["-7", "-10", "7", "error", "error", "error"]);
});
