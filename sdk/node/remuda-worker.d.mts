/** A failure with a code for programs. */
export class TaskError extends Error {
  constructor (message: string, code?: string, data?: unknown)
  code?: string
  data?: unknown
}

/** What there is to do. */
export class Task {
  readonly name: string
  /** The task as bytes. */
  readonly body: Buffer
  /** The task as JSON; null where it is empty. */
  readonly data: any
  /** Fires when the answer is not wanted any more. */
  readonly signal: AbortSignal
  /** Tells whoever waits how far the task is. */
  progress (value: unknown): void
  /** Sends a piece of the result ahead of the rest. */
  chunk (value: unknown): void
}

export type Handler = (task: Task) => unknown

/** Takes tasks until the parent says stop or is gone. */
export function serve (handlers: Handler | Record<string, Handler>): Promise<void>
