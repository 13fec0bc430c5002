"""Chats on their way into a language model: the template, the sandbox that it runs in, and the cutting of long ones."""
