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

// dropFiles closes what came with an answer that nobody waits for.
func (c *call) dropFiles() {
	closeFiles(c.req.Got)
	c.req.Got = nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
