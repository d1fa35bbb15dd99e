//! `docker-compose.yml` beside `deploy/services`, the one list of services.

const COMPOSE: &str = include_str!("../../../docker-compose.yml");
const SERVICES: &str = include_str!("../../../deploy/services");

/// Those of the compose file that take over what the fleet's services share, each with its lines.
fn services() -> Vec<(&'static str, Vec<&'static str>)> {
    let (_, section) = COMPOSE.split_once("\nservices:\n").unwrap();
    let (section, _) = section.split_once("\nvolumes:\n").unwrap();
    let mut services: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in section.lines() {
        match line.strip_prefix("  ").and_then(|line| line.strip_suffix(':')) {
            Some(name) if !name.starts_with(' ') => services.push((name, Vec::new())),
            _ => services.last_mut().into_iter().for_each(|(_, lines)| lines.push(line.trim())),
        }
    }
    services.retain(|(_, lines)| lines.contains(&"<<: *service") || lines.contains(&"<<: *worker"));
    services
}

#[test]
fn every_service_is_in_it_and_no_other() {
    let listed: Vec<_> = SERVICES.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(services().iter().map(|(name, _)| *name).collect::<Vec<_>>(), listed);
}

#[test]
fn every_service_runs_the_program_of_its_name() {
    for (name, lines) in services() {
        let runs = |key| lines.contains(&&*format!(r#"{key}: ["{name}"]"#));
        assert!(runs("command") || runs("entrypoint"), "{name}: {lines:?}");
    }
}

#[test]
fn every_service_has_a_health_check() {
    let (_, worker) = COMPOSE.split_once("\nx-worker: &worker\n").unwrap();
    let (worker, _) = worker.split_once("\n\n").unwrap();
    assert!(worker.contains("\n  healthcheck: &health\n") && worker.contains(r#""--probe"]"#));
    for (name, lines) in services() {
        let own =
            lines.contains(&"healthcheck:") && lines.contains(&&*format!(r#"test: ["CMD", "{name}", "--probe"]"#));
        assert!(own || lines.contains(&"<<: *worker") && !lines.contains(&"healthcheck:"), "{name}: {lines:?}");
    }
}

#[test]
fn every_image_is_pinned_by_a_variable() {
    for image in COMPOSE.lines().filter_map(|line| line.trim().strip_prefix("image: ")) {
        let (_, tag) = image.split_once(":${").unwrap_or_default();
        let pinned =
            tag.split_once("_TAG:-").is_some_and(|(_, default)| default.starts_with(|c: char| c.is_ascii_digit()));
        assert!(pinned || image == "murmuration", "{image}");
    }
}

#[test]
fn every_service_has_an_account_of_its_own_at_both_servers() {
    let (_, rights) = COMPOSE.split_once("\n  rights:\n").unwrap();
    let (rights, _) = rights.split_once("\n\n").unwrap();
    for (name, lines) in services() {
        let (user, password) = (name.replace('-', "_"), format!("{}_PASSWORD", name.replace('-', "_").to_uppercase()));
        let at = |section: &str, server: &str| {
            let own = format!("MURMURATION__{section}__URL: {server}://murmuration_{user}:${{{password}}}@");
            lines.iter().any(|line| line.starts_with(&own))
        };
        assert!(at("DATABASE", "postgres") && (name == "api-gateway" || at("BROKER", "amqp")), "{name}: {lines:?}");
        assert!(rights.contains(&format!("\n      {password}: ${{{password}:?")), "{name} has no account made");
    }
}

#[test]
fn no_password_has_a_default() {
    for line in COMPOSE.lines().filter(|line| line.contains("PASS")) {
        assert!(!line.contains("PASSWORD:-") && !line.contains("PASSWORD-"), "{line}");
    }
}
