// Package supervise keeps children running: child specs, restart policy and
// intensity, backoff, dependencies, strategies and trees.
//
// A [Child] is an interface, so a process, a pool of workers or another
// supervisor can be one. A [Supervisor] owns the lives of its children: it
// alone decides when one is started, and it follows every run to its end.
//
// Invariants: a child has at most one live [Run] at a time, and the next start
// is not begun before the earlier run is Done; only during a replacement
// ([Supervisor.Replace]) there are two, of which one counts. No run is ever
// forgotten while it lives; after a requested stop nothing is restarted; what
// should run runs, or Status says in words why not.
//
// It knows no processes, no files and no network, and must never import
// anything of Remuda.
package supervise
