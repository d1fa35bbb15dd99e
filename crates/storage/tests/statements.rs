//! Prepares every SQL statement of the crate against the migrated schema, so that one that is wrong is found before it runs.
//!
//! The statements are found in the source: what each `sql_query` is called with, a literal or a `format!`, and the types that
//! are bound to it. A `format!` stands for all its forms: a part may be whatever literals its `let` or `for` holds, its
//! constant, or the calls of the function that it's a parameter of; what is left is in [`PARTS`]. A statement that the test
//! doesn't see fails it: a part that it can't tell, another way of running SQL, a literal that looks like SQL.

use diesel::connection::SimpleConnection as _;
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, mem,
    path::{Path, PathBuf},
};
use syn::{
    Attribute, Expr, ExprCall, ExprForLoop, ExprIf, ExprLit, ExprMethodCall, ExprPath, ExprTuple, FnArg,
    GenericArgument, ImplItemFn, ItemConst, ItemFn, Lit, LitStr, Local, Macro, Pat, PathArguments, Signature, Token,
    Type,
    punctuated::Punctuated,
    visit::{self, Visit},
};
use test_support::TestDatabase;

type Arguments = Punctuated<Expr, Token![,]>;

/// What statements begin with that can be prepared.
const PREPARED: [&str; 5] = ["SELECT", "INSERT", "UPDATE", "DELETE", "WITH"];

/// What statements begin with that can't be prepared. Literals are run, and undone; those that are composed are left to other
/// tests, since they hold nothing but names and numbers from elsewhere.
const UNPREPARED: [&str; 7] = ["SET", "LOCK", "CREATE", "DROP", "ALTER", "GRANT", "REVOKE"];

/// What needs a cursor to be there: other tests run these.
const OF_A_CURSOR: [&str; 2] = ["FETCH", "CLOSE"];

/// Parts that a caller or another crate decides: those of one line go together.
const PARTS: [&[(&str, &str)]; 4] = [
    &[("id", "1"), ("on_conflict", ""), ("table", "email_notification"), ("address", "email")],
    &[("id", "1"), ("on_conflict", ""), ("table", "sms_notification"), ("address", "phone")],
    &[("id", "1"), ("on_conflict", "ON CONFLICT DO NOTHING"), ("table", "email_notification"), ("address", "email")],
    &[("id", "1"), ("on_conflict", "ON CONFLICT DO NOTHING"), ("table", "sms_notification"), ("address", "phone")],
];

/// Parameters for which other crates pass a constant of this one: where that is, and its name.
const PASSED: [(&str, (&str, &str)); 1] = [("effects", ("streams/account_effects.rs", "CHECKS"))];

/// Where SQL is run in another way: other tests run each of these, whatever they are about.
const OTHER_WAYS: [(&str, &str); 6] = [
    ("log/message_outbox.rs", "push_sql"),
    ("messaging/outbox.rs", "sql"),
    ("messaging/sleeper.rs", "batch_execute"),
    ("session.rs", "batch_execute"),
    ("streams/events.rs", "sql"),
    ("streams/results.rs", "sql"),
];

#[test]
fn every_statement_fits_the_schema() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files: Vec<_> = sources(&root)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            (name, syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap())
        })
        .collect();
    let mut texts = Texts::default();
    for (name, file) in &files {
        texts.file.clone_from(name);
        texts.visit_file(file);
    }
    let mut search = Search { texts, ..Search::default() };
    for (name, file) in &files {
        search.texts.file.clone_from(name);
        search.visit_file(file);
    }

    let db = TestDatabase::new();
    let mut conn = db.database().connection().unwrap();
    for (place, types, sql) in &search.statements {
        if begins_with(sql, &OF_A_CURSOR) {
            continue;
        }
        let check = match begins_with(sql, &PREPARED) {
            true => format!("PREPARE checked {types} AS {sql}; DEALLOCATE checked"),
            false => format!("BEGIN; {sql}; ROLLBACK"),
        };
        if let Err(error) = conn.batch_execute(&check) {
            search.wrong.push(format!("{place}: {error}: {sql}"));
            conn.batch_execute("ROLLBACK").unwrap();
        }
    }
    for (place, text) in &search.suspects {
        let seen = |(_, _, sql): &(_, _, String)| sql.contains(text);
        if !search.seen.contains(text) && !search.statements.iter().any(seen) {
            search.wrong.push(format!("{place}: not run by `sql_query`: {text}"));
        }
    }
    assert!(search.wrong.is_empty(), "\n{}", search.wrong.join("\n\n"));
    assert!(search.statements.len() > 100, "found {} statements", search.statements.len());
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// What names may stand for: constants by file and name, parameters by function and position.
#[derive(Default)]
struct Texts {
    file: String,
    constants: BTreeMap<(String, String), Expr>,
    arguments: BTreeMap<(String, usize), Vec<Expr>>,
}

impl<'ast> Visit<'ast> for Texts {
    fn visit_item_const(&mut self, item: &'ast ItemConst) {
        self.constants.insert((self.file.clone(), item.ident.to_string()), (*item.expr).clone());
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        if let Some(function) = name(&call.func) {
            for (position, argument) in call.args.iter().enumerate() {
                self.arguments.entry((function.clone(), position)).or_default().push(argument.clone());
            }
        }
        visit::visit_expr_call(self, call);
    }
}

impl Texts {
    /// The literals that an expression may come to; of pairs, those in this position.
    fn of(&self, expr: &Expr, position: Option<usize>) -> Vec<String> {
        let mut literals = Literals { texts: self, position, found: Vec::new() };
        literals.visit_expr(expr);
        literals.found
    }

    fn constant(&self, name: &str, position: Option<usize>) -> Vec<String> {
        let passed = PASSED.iter().find(|(parameter, _)| *parameter == name).map(|(_, constant)| *constant);
        let (file, name) = passed.unwrap_or((&self.file, name));
        let own = self.constants.get(&(file.to_owned(), name.to_owned()));
        let constant =
            own.or_else(|| self.constants.iter().find(|((_, other), _)| other == name).map(|(_, expr)| expr));
        constant.map(|expr| self.of(expr, position)).unwrap_or_default()
    }
}

struct Literals<'a> {
    texts: &'a Texts,
    position: Option<usize>,
    found: Vec<String>,
}

impl<'ast> Visit<'ast> for Literals<'_> {
    fn visit_expr_lit(&mut self, literal: &'ast ExprLit) {
        match &literal.lit {
            Lit::Str(text) => self.found.push(text.value()),
            Lit::Int(number) => self.found.push(number.base10_digits().to_owned()),
            _ => {}
        }
    }

    fn visit_expr_path(&mut self, path: &'ast ExprPath) {
        let name = path.path.segments.last().unwrap().ident.to_string();
        self.found.extend(self.texts.constant(&name, self.position));
    }

    fn visit_expr_tuple(&mut self, tuple: &'ast ExprTuple) {
        match self.position.take() {
            Some(position) => {
                tuple.elems.get(position).into_iter().for_each(|elem| self.visit_expr(elem));
                self.position = Some(position);
            }
            None => visit::visit_expr_tuple(self, tuple),
        }
    }

    fn visit_macro(&mut self, made: &'ast Macro) {
        let arguments = made.parse_body_with(Arguments::parse_terminated);
        arguments.iter().flatten().for_each(|argument| self.visit_expr(argument));
    }

    // Which arm it is may be told by other literals.
    fn visit_pat(&mut self, _: &'ast Pat) {}

    fn visit_expr_if(&mut self, branch: &'ast ExprIf) {
        self.visit_block(&branch.then_branch);
        branch.else_branch.iter().for_each(|(_, other)| self.visit_expr(other));
    }
}

/// Finds the statements.
#[derive(Default)]
struct Search {
    texts: Texts,
    /// What the variables of the function may hold.
    variables: BTreeMap<String, Vec<String>>,
    /// Where they are, their parameters' types, and what they say.
    statements: Vec<(String, String, String)>,
    /// Literals that look like SQL.
    suspects: Vec<(String, String)>,
    /// Literals that statements are composed from.
    seen: HashSet<String>,
    /// The types that are bound to the statement that comes next.
    bound: Option<Vec<String>>,
    wrong: Vec<String>,
}

impl<'ast> Visit<'ast> for Search {
    fn visit_item_fn(&mut self, function: &'ast ItemFn) {
        let outer = mem::take(&mut self.variables);
        visit::visit_item_fn(self, function);
        self.variables = outer;
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        let outer = mem::take(&mut self.variables);
        visit::visit_impl_item_fn(self, function);
        self.variables = outer;
    }

    fn visit_signature(&mut self, signature: &'ast Signature) {
        let typed = signature.inputs.iter().filter_map(|input| match input {
            FnArg::Typed(input) => Some(&*input.pat),
            FnArg::Receiver(_) => None,
        });
        for (position, pat) in typed.enumerate() {
            let arguments = self.texts.arguments.get(&(signature.ident.to_string(), position));
            let texts = arguments.into_iter().flatten().flat_map(|argument| self.texts.of(argument, None));
            self.bind(pat, texts.collect());
        }
    }

    fn visit_local(&mut self, local: &'ast Local) {
        if let Some(init) = &local.init {
            self.bind_all(if let Pat::Type(typed) = &local.pat { &typed.pat } else { &local.pat }, &init.expr);
        }
        visit::visit_local(self, local);
    }

    fn visit_expr_for_loop(&mut self, each: &'ast ExprForLoop) {
        self.bind_all(&each.pat, &each.expr);
        visit::visit_expr_for_loop(self, each);
    }

    fn visit_expr_method_call(&mut self, call: &'ast ExprMethodCall) {
        let (mut types, mut link) = (Vec::new(), call);
        let root = loop {
            if let ("bind", Some(bound)) = (&*link.method.to_string(), &link.turbofish) {
                types.insert(0, postgres_type(bound.args.first()));
            }
            match &*link.receiver {
                Expr::MethodCall(next) => link = next,
                root => break root,
            }
        };
        let is_statement = matches!(root, Expr::Call(root) if name(&root.func).as_deref() == Some("sql_query"));
        if is_statement && self.bound.is_none() {
            self.bound = Some(types);
        }
        self.another_way(&call.method.to_string(), &call.args);
        visit::visit_expr_method_call(self, call);
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        match name(&call.func).as_deref() {
            Some("sql_query") => {
                let types = self.bound.take().unwrap_or_default().join(", ");
                let types = if types.is_empty() { types } else { format!("({types})") };
                for form in self.forms(&call.args[0]) {
                    self.statements.push((self.texts.file.clone(), types.clone(), form));
                }
            }
            Some(function) => self.another_way(function, &call.args),
            None => {}
        }
        visit::visit_expr_call(self, call);
    }

    fn visit_macro(&mut self, made: &'ast Macro) {
        match made.parse_body_with(Arguments::parse_terminated) {
            Ok(arguments) => arguments.iter().for_each(|argument| self.visit_expr(argument)),
            Err(_) if made.tokens.to_string().contains("sql_query") => {
                self.wrong.push(format!("{}: a statement within a macro", self.texts.file));
            }
            Err(_) => {}
        }
    }

    fn visit_lit_str(&mut self, literal: &'ast LitStr) {
        let text = literal.value();
        // Privileges have the names of statements.
        let privileges = self.texts.file == "rights.rs";
        if !privileges && (begins_with(&text, &PREPARED) || begins_with(&text, &UNPREPARED)) {
            self.suspects.push((self.texts.file.clone(), text));
        }
    }

    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

impl Search {
    fn bind(&mut self, pat: &Pat, texts: Vec<String>) {
        if let Pat::Ident(variable) = pat {
            self.variables.insert(variable.ident.to_string(), texts);
        }
    }

    fn bind_all(&mut self, pat: &Pat, value: &Expr) {
        match pat {
            Pat::Tuple(pats) => {
                for (position, pat) in pats.elems.iter().enumerate() {
                    self.bind(pat, self.texts.of(value, Some(position)));
                }
            }
            pat => self.bind(pat, self.texts.of(value, None)),
        }
    }

    fn another_way(&mut self, function: &str, arguments: &Arguments) {
        if !["sql", "push_sql", "batch_execute"].contains(&function) {
            return;
        }
        self.seen.extend(arguments.iter().flat_map(|argument| self.texts.of(argument, None)));
        if !OTHER_WAYS.contains(&(&self.texts.file, function)) {
            self.wrong.push(format!("{}: `{function}` isn't among OTHER_WAYS", self.texts.file));
        }
    }

    /// What a statement may say.
    fn forms(&mut self, argument: &Expr) -> BTreeSet<String> {
        let composed = match argument {
            Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => return BTreeSet::from([text.value()]),
            Expr::Macro(composed) => composed.mac.parse_body_with(Arguments::parse_terminated).unwrap(),
            _ => {
                self.wrong.push(format!("{}: a `sql_query` of neither a literal nor a `format!`", self.texts.file));
                return BTreeSet::new();
            }
        };
        let mut template = self.texts.of(&composed[0], None).remove(0);
        self.seen.insert(template.clone());
        if begins_with(&template, &UNPREPARED) {
            return BTreeSet::new();
        }
        template = template.replace("{{", "\u{1}").replace("}}", "\u{2}");
        let mut given = BTreeMap::new();
        for (position, argument) in composed.iter().skip(1).enumerate() {
            let (part, value) = match argument {
                Expr::Assign(assigned) => (name(&assigned.left).unwrap(), &*assigned.right),
                value => {
                    template = template.replacen("{}", &format!("{{{position}}}"), 1);
                    (position.to_string(), value)
                }
            };
            given.insert(part, self.texts.of(value, None));
        }
        let parts: BTreeSet<_> =
            template.split('{').skip(1).map(|rest| rest.split('}').next().unwrap().to_owned()).collect();
        let mut forms = BTreeSet::new();
        for line in PARTS {
            let mut of_line = vec![template.clone()];
            for part in &parts {
                let known = given.get(part).or_else(|| self.variables.get(part)).filter(|texts| !texts.is_empty());
                let mut texts = known.cloned().unwrap_or_else(|| self.texts.constant(part, None));
                if texts.is_empty() {
                    texts.extend(line.iter().filter(|(name, _)| name == part).map(|(_, text)| (*text).to_owned()));
                }
                if texts.is_empty() {
                    self.wrong.push(format!("{}: what is {{{part}}} in: {template}", self.texts.file));
                }
                let fill = |form: &String| {
                    texts.iter().map(|text| form.replace(&format!("{{{part}}}"), text)).collect::<Vec<_>>()
                };
                of_line = of_line.iter().flat_map(fill).collect();
            }
            forms.extend(of_line.into_iter().map(|form| form.replace('\u{1}', "{").replace('\u{2}', "}")));
        }
        forms
    }
}

fn begins_with(sql: &str, verbs: &[&str]) -> bool {
    sql.split_whitespace().next().is_some_and(|verb| verbs.contains(&verb))
}

fn name(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Path(path) => path.path.segments.last().map(|segment| segment.ident.to_string()),
        _ => None,
    }
}

fn postgres_type(argument: Option<&GenericArgument>) -> String {
    let Some(GenericArgument::Type(Type::Path(path))) = argument else { panic!("a type") };
    let segment = path.path.segments.last().unwrap();
    let inner = match &segment.arguments {
        PathArguments::AngleBracketed(inner) => inner.args.first(),
        _ => None,
    };
    match &*segment.ident.to_string() {
        "Array" => postgres_type(inner) + "[]",
        "Nullable" => postgres_type(inner),
        "BigInt" => "bigint".to_owned(),
        "Binary" => "bytea".to_owned(),
        plain => plain.to_lowercase(),
    }
}
