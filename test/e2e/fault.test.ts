/** The faults that take a moment only; `make fault` does all of them and writes the table in test/README.md. */
import { FAULTS, testFaults } from "../fault/faults.ts";

testFaults(
  FAULTS.filter(({ quick }) => quick),
  { timed: false },
);
