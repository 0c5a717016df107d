/// <reference types="node" />
import type { Socket as UDPSocket } from 'node:dgram'
import type { Server, Socket } from 'node:net'

/** A failure with a code for programs. */
export class TaskError extends Error {
  constructor (message: string, code?: string, data?: unknown)
  code?: string
  data?: unknown
}

/** What there is to do. */
export class Task {
  private constructor ()
  readonly name: string
  /** The task as bytes. */
  readonly body: Buffer
  /** The task as JSON; null where it is empty. */
  readonly data: any
  /** Fires when the answer is not wanted any more. */
  readonly signal: AbortSignal
  /**
   * What came along: connections and pipes to read from as Socket, listeners as
   * Server, UDP sockets as dgram.Socket, other ends of pipes bare. A handler that
   * has looked at this must close them; else they are closed at its end.
   */
  readonly handles: Array<Socket | Server | UDPSocket>
  /** Tells whoever waits how far the task is. */
  progress (value: unknown): void
  /** Sends a piece of the result ahead of the rest. */
  chunk (value: unknown): void
  /** Gives a message to all who have subscribed to topic; waits for none. */
  publish (topic: string, value?: unknown): void
}

/** Something that was published. */
export class Message {
  private constructor ()
  readonly topic: string
  /** The message as bytes. */
  readonly body: Buffer
  /** The message as JSON; null where it is empty. */
  readonly data: any
  /** How many were dropped since the one before, as this worker was slow. */
  readonly missed: number
}

/** Returns the result or a promise of it: bytes as they are, else as JSON. */
export type Handler = (task: Task) => unknown
/** By the names of their tasks; the one under '' gets all others. */
export type Handlers = Handler | Record<string, Handler>
export type Subscriber = (message: Message) => unknown

export interface SubscribeOptions {
  /** What becomes of messages that this worker does not read in time. */
  slow?: 'drop-oldest' | 'drop-newest' | 'disconnect'
}

export class Worker {
  private constructor ()
  /** Resolved at the end, rejected where the parent broke the protocol. */
  readonly closed: Promise<void>
  /** Gives a message to all who have subscribed to topic; waits for none. */
  publish (topic: string, value?: unknown): void
  /** A topic may end in "*". The function that is returned ends it. */
  subscribe (topic: string, call: Subscriber, options?: SubscribeOptions): () => void
}

/** Makes a Worker, once in a process, which takes tasks from then on. */
export function open (handlers: Handlers): Worker

/** Takes tasks until the parent says stop or is gone. */
export function serve (handlers: Handlers, options?: { subscribe?: Record<string, Subscriber> }): Promise<void>
