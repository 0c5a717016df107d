package proc

import "context"

// Direct is a [Spawner] whose processes are children of the calling process
// and are usually ended with it. The zero value is ready to use.
type Direct struct {
	// Tag is the instance tag in [RunVar] and the cgroup's name; see
	// [ValidTag]. Default "direct<pid>".
	Tag string
}

var _ Spawner = (*Direct)(nil)

// Spawn implements [Spawner].
func (d *Direct) Spawn(ctx context.Context, spec Spec) (Process, error) {
	return nil, context.Canceled
}

// Launcher is the mechanism under both spawners.
type Launcher struct{}

// Describe says in a sentence each how runs are tracked and where memory limits come from:
// "cgroup v2 at …", "none: …".
func (l *Launcher) Describe() (tree, memory string) { return "", "" }

// Support describes what the calling process could have, without making anything.
func Support() (tree, memory string) { return "", "" }

// Sweep kills every process that an earlier keeper of the same instance tag
// left behind and removes its cgroup directories. It returns how many
// processes it killed. The caller, its ancestors and its children are spared.
func Sweep(ctx context.Context, tag string) (killed int, err error) { return 0, nil }
