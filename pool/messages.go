package pool

import "os"

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
