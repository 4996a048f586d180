"""Wordings of questions about code and prose: family -> split -> (without the file, naming the file)."""

from __future__ import annotations

CODE: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "constant": {
        "train": (
            (
                "What is the value of {name}?",
                "What is {name} set to?",
                "Which value does {name} have?",
                "What value is assigned to {name}?",
                "How is {name} defined?",
                "Give me the value of the constant {name}.",
                "Tell me what {name} equals.",
                "Look up {name}.",
                "What does {name} equal?",
                "{name} = ?",
                "Find the definition of {name} and quote its value.",
                "To what is the variable {name} initialised?",
                "What's {name}?",
                "Quote the line that sets {name}.",
                "`{name}`: what is its value?",
                "I need the value of {name}, please.",
            ),
            (
                "What is the value of {name} in {file}?",
                "What does {file} set {name} to?",
                "In {file}, what is {name}?",
                "Which value has {name} in {file}?",
            ),
        ),
        "held_out": (
            (
                "Please state the value that {name} holds.",
                "What was chosen for {name}?",
                "Could you tell me the setting of {name}?",
                "What is stored in {name}?",
                "With which value is {name} defined?",
            ),
            ("According to {file}, what is the value of {name}?", "What is stored in {name} by {file}?"),
        ),
    },
    "parameters": {
        "train": (
            (
                "What are the parameters of {name}?",
                "Which parameters does {name} take?",
                "Which arguments does the function {name} accept?",
                "What is the signature of {name}?",
                "How is {name} called?",
                "Show the signature of {name}().",
                "List the arguments of {name}.",
                "What does {name} take as arguments?",
                "Give me the def line of {name}.",
                "What parameters are there in def {name}?",
                "Quote the definition line of {name}.",
                "Which inputs does `{name}` have?",
                "def {name}(?",
                "I want to call {name}. Which arguments does it take?",
            ),
            (
                "What are the parameters of {name} in {file}?",
                "In {file}, which arguments does {name} take?",
                "What is the signature of {name} in {file}?",
                "{file}: how is the function {name} declared?",
            ),
        ),
        "held_out": (
            (
                "Please write out the parameter list of {name}.",
                "What has to be passed to {name}?",
                "How is the function {name} declared?",
                "Could you show me the arguments for {name}?",
                "With which parameters is {name} defined?",
            ),
            ("According to {file}, which parameters does {name} have?", "What has to be passed to {name} from {file}?"),
        ),
    },
    "class": {
        "train": (
            (
                "Which class contains {name}?",
                "In which class is {name} defined?",
                "What class does the method {name} belong to?",
                "Which class defines the method {name}?",
                "To which class does {name} belong?",
                "{name} is a method of which class?",
                "Where is the method {name} defined?",
                "Name the class that has the method {name}.",
                "Find the class with the method {name}.",
                "What is the class of {name}()?",
                "Which class is `{name}` in?",
                "I am looking for the class that implements {name}.",
            ),
            (
                "Which class of {file} contains {name}?",
                "In {file}, which class defines {name}?",
                "What class does {name} in {file} belong to?",
            ),
        ),
        "held_out": (
            (
                "Please name the class around the method {name}.",
                "Which class offers the method {name}?",
                "The method {name}: part of which class?",
                "Could you tell me the class where {name} lives?",
            ),
            ("According to {file}, which class does {name} live in?", "Which class from {file} offers {name}?"),
        ),
    },
    "docstring": {
        "train": (
            (
                "What does {name} do?",
                "What does the docstring of {name} say?",
                "What is the purpose of {name}?",
                "What is {name} for?",
                "Describe the function {name}.",
                "How does the documentation describe {name}?",
                "Explain {name}.",
                "Quote the first sentence of the docstring of {name}.",
                "How is {name} documented?",
                "What is `{name}` used for?",
                "Summarise what {name} does.",
                "Give me the documentation of {name}.",
            ),
            (
                "What does {name} in {file} do?",
                "In {file}, what is {name} for?",
                "How does {file} describe {name}?",
            ),
        ),
        "held_out": (
            (
                "Please tell me what the function {name} is meant to do.",
                "What happens when {name} is called, by its docstring?",
                "How do the docs explain {name}?",
                "Why would one call {name}?",
            ),
            ("According to {file}, what does {name} do?", "How do the docs in {file} explain {name}?"),
        ),
    },
}

PROSE: dict[str, dict[str, tuple[str, ...]]] = {
    "option": {
        "train": (
            "What does the option {name} do?",
            "What does {name} mean?",
            "What is the option {name} for?",
            "Explain the flag {name}.",
            "What happens with {name}?",
            "Describe {name}.",
            "What is the effect of {name}?",
            "How is the option {name} described?",
            "When would I use {name}?",
            "Quote the description of {name}.",
        ),
        "held_out": (
            "Please tell me what the switch {name} changes.",
            "How does the manual explain {name}?",
            "What would passing {name} do?",
            "Which effect has {name}?",
        ),
    },
    "definition": {
        "train": (
            "What does {name} mean?",
            "What is the definition of {name}?",
            "Define {name}.",
            "How is {name} defined?",
            "What is meant by {name}?",
            "Give the definition of the word {name}.",
            "Look up {name} in the dictionary.",
            "What is {name}?",
            "Explain the word {name}.",
            "Quote the entry for {name}.",
        ),
        "held_out": (
            "Please tell me the meaning of {name}.",
            "How does the dictionary explain {name}?",
            "What would one call {name}?",
            "Which meaning has the word {name}?",
        ),
    },
}
