// Package results holds the record of a run: what was predicted by formula
// before it, what was measured, and the judgement of the one against the other.
//
// A run ends in one of four verdicts. Held: every prediction came true.
// Refuted: at least one did not. Void: the run says nothing, because its load
// generator fell behind, a probe was missing or a predicted metric was not
// measured. Skipped: the kernel or the privilege lacks something, and the reason
// says what. Void is never green.
//
// The same [Record] serves the tests, the command line, the report for people
// ([WriteTable]), the comparison of two runs ([Compare]) and the golden records
// ([CheckGolden]). On disk it is one JSON document whose schema is [Schema].
//
// The package refuses to
//   - evaluate formulas: a prediction carries its value, and the formula and
//     inputs are there for people to check it by;
//   - guess: an absent measurement is null, never zero, and a measurement in
//     another unit than the prediction's is no measurement of it;
//   - estimate: a prediction states its tolerance beforehand, and nothing here
//     widens it or fits one to what was measured. The only statistics are the
//     exact tests of [Poisson] and [Binomial], whose level is part of the
//     prediction;
//   - overwrite: [Save] always makes a new file.
//
// [Save] rests on O_TMPFILE (open(2), Linux 3.11) and on linkat(2) with
// AT_SYMLINK_FOLLOW on /proc/self/fd, so that a killed run leaves a whole record
// or none.
package results
