package pool

import (
	"os"

	"github.com/remuda-dev/remuda/ipc"
)

// Publish gives body, which must not be changed any more, to all who have
// subscribed to topic: workers, and callers of Subscribe. It does not wait for
// them, nor for workers that are not up: a message that must be heard is a task.
// Errors: [ipc.ErrTopic], [ipc.ErrTooLarge].
func (p *Pool) Publish(topic string, body []byte) error { return p.o.Topics.Publish(topic, body) }

// Subscribe subscribes to what workers and Publish publish under topic, or with
// a "*" at the end under all whose names begin with what precedes it. The caller
// must Close the subscription, which outlasts the pool. Error: [ipc.ErrTopic].
func (p *Pool) Subscribe(topic string, o ipc.SubscribeOptions) (*ipc.Subscription, error) {
	return p.o.Topics.Subscribe(topic, o)
}

// Buffer makes n bytes that workers which share memory read where they are: a
// task whose Body lies in it, and that names it as its Buffer, is not copied. It
// is for any number of tasks, one after the other or at a time, of this pool or
// others. The caller must Release it.
func (p *Pool) Buffer(n int) (*ipc.Buffer, error) { return ipc.NewBuffer(n) }

// Release says that Body is not used any more, which must not be touched then.
// It must be called for the result of a task with ShareResult; for others it does
// nothing. Until then the worker cannot use that memory again, but it can change
// it, if it is up to no good: what matters is copied before it is checked.
func (r *Result) Release() {
	if r.release != nil {
		r.release()
		r.release = nil
	}
}

// dropAnswer gives back what came with an answer that nobody waits for.
func (c *call) dropAnswer() {
	closeFiles(c.req.Got)
	if c.req.Release != nil {
		c.req.Release()
	}
	c.req.Got, c.req.Release = nil, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
